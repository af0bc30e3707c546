/* Packets of the static shim to its node's pool, as wire.py draws them. Part of shim.c. */

#include <sys/random.h>
#include <sys/un.h>

/* Sends a packet and fds; false if that is not possible now. */
static bool send_packet(const Text *text, const int *fds, size_t count) {
    struct iovec bytes = {text->at, text->used};
    union {
        struct cmsghdr header;
        char space[CMSG_SPACE(8 * sizeof(int))];
    } control;
    struct msghdr message = {.msg_iov = &bytes, .msg_iovlen = 1};
    if (count) {
        memset(&control, 0, sizeof control);
        message.msg_control = &control, message.msg_controllen = CMSG_SPACE(count * sizeof(int));
        control.header.cmsg_len = CMSG_LEN(count * sizeof(int));
        control.header.cmsg_level = SOL_SOCKET, control.header.cmsg_type = SCM_RIGHTS;
        memcpy(CMSG_DATA(&control.header), fds, count * sizeof(int));
    }
    return !text->over && sendmsg(own.pool, &message, MSG_NOSIGNAL | MSG_DONTWAIT) == (ssize_t)text->used;
}

__attribute__((format(printf, 1, 2))) static void tell_pool(const char *format, ...) {
    char bytes[128];
    va_list values;
    va_start(values, format);
    int count = vsnprintf(bytes, sizeof bytes, format, values);
    va_end(values);
    Text text = {bytes, (size_t)count + 1, sizeof bytes, false};
    (void)send_packet(&text, NULL, 0); /* a pool that does not read soon counts as silent */
}

/* Adds directory and environment; the agent's socket comes first, as the first variable of a name counts. */
static void put_place(Text *text) {
    char cwd[4096];
    put_field(text, "cwd=%s", getcwd(cwd, sizeof cwd) ? cwd : "/");
    put_field(text, "%s", "");
    put_field(text, "%s=%s", NAME_SOCKET, own.agent);
    for (char **variable = environ; *variable; variable++)
        put_field(text, "%s", *variable);
}

static void connect_pool(const char *path) {
    struct sockaddr_un name = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof name.sun_path)
        take_over("the path of the pool's socket is too long", true);
    strcpy(name.sun_path, path);
    own.pool = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    int room = 2 * MAX_PACKET;
    setsockopt(own.pool, SOL_SOCKET, SO_SNDBUF, &room, sizeof room);
    if (connect(own.pool, (struct sockaddr *)&name, sizeof name)) {
        close_fd(&own.pool);
        take_over("no pool answers", true); /* shim.py tries again */
    }
    Text wants = {packet, 0, sizeof packet, false};
    put_field(&wants, "wants=%d", VERSION);
    put_field(&wants, "machine=%s", MACHINE);
    put_field(&wants, "python=%s", PYTHON_VERSION);
    put_field(&wants, "base=%s", BASE);
    put_place(&wants);
    if (!send_packet(&wants, NULL, 0)) {
        close_fd(&own.pool);
        take_over("the pool cannot be told", true);
    }
}

/* Asks for a worker. With the request go the listener, the worker's end of a line, a connection that has arrived. */
static void ask(void) {
    long long start = nanoseconds();
    own.asked_at = own.heard = (double)start / 1e9;
    own.forking = true, own.standby = own.retired = own.finished = false;
    own.turn = own.inside = 0, own.serves = -1, own.size = -1, own.unread = 0;
    if (own.number++) { /* another start, with a ledger of its own */
        spans.used = 0, spans.over = false;
        add_span(start, start, "shim restart");
        own.t0 = start;
    }
    unsigned char bytes[8];
    (void)!getrandom(bytes, sizeof bytes, 0);
    for (int i = 0; i < 8; i++)
        snprintf(own.start_id + 2 * i, 3, "%02x", bytes[i]);
    int line[2], fds[6], count = 0;
    bool asked = !socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, line);
    if (asked) {
        own.line = line[0], own.theirs = line[1];
        fcntl(own.line, F_SETFL, O_NONBLOCK);
        fds[count++] = own.listener, fds[count++] = own.theirs;
        if (own.arrived >= 0)
            fds[count++] = own.arrived;
        fds[count++] = 0, fds[count++] = 1, fds[count++] = 2;
        Text request = {packet, 0, sizeof packet, false};
        put_field(&request, "fork=%lld", own.number);
        put_field(&request, "start_id=%s", own.start_id);
        put_bytes(&request, spans.at, spans.used);
        put_place(&request);
        asked = send_packet(&request, fds, (size_t)count);
    }
    if (!asked) {
        own.forking = false;
        close_fd(&own.line), close_fd(&own.theirs);
        take_over("the pool cannot be asked", true);
    }
    add_span(start, nanoseconds(), "shim spawn");
}
