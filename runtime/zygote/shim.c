/* Owns a container of node mode as shim.py does, without an interpreter: the port, the pool's wire, one worker.

   It does what goes as expected. Whatever else happens, shim.py does: it is executed in place of this program, in the
   same process, and takes over what there is (takeover.py). So nothing here starts a process, or decides anything.

       not plain node mode ─────────────────────────────────────────────────▶ shim.py, from its begin
       asking ──forked──▶ serving ──retired──▶ parked ──a request──▶ asking
          any of them ──crash, refusal, silence, an unknown word────────────▶ shim.py, with all that is there

   A message is looked at before it is taken, so that shim.py finds what was not for us where it was. Built by
   native.py, which says what PYTHON, VERSION and LOCK are. The protocols are drawn in wire.py and control.py. */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdint.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/random.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "text.h"

enum { PACKET = 256 << 10, LINE = 64 << 10, NOTES = 16 << 10, TURNS = 16 };
#define NEVER 1e18 /* seconds */
static const double READY = 1.0, FORKED = 2.0, SILENCE = 1.0, ORPHAN = 2.0;
extern char **environ;

static char packet[PACKET + 1], line_bytes[LINE], span_bytes[NOTES], phase_bytes[NOTES];
static Text spans = {span_bytes, 0, sizeof span_bytes, false}; /* rows of the ledger, as JSON, with commas between */
static Text phases = {phase_bytes, 0, sizeof phase_bytes, false}; /* the same, for people */

__attribute__((format(printf, 1, 2))) static void say(const char *format, ...) {
    char bytes[4096] = "glowplug: "; /* one write: lines of several processes share this stream */
    size_t begin = strlen(bytes);
    va_list values;
    va_start(values, format);
    int count = vsnprintf(bytes + begin, sizeof bytes - begin - 1, format, values);
    va_end(values);
    size_t room = sizeof bytes - begin - 2;
    size_t size = begin + (count < 0 ? 0 : (size_t)count < room ? (size_t)count : room);
    bytes[size++] = '\n';
    (void)!write(2, bytes, size);
}

/* --- what there is ------------------------------------------------------------------------------------------------ */

static struct {
    int listener, pool, line, theirs, pidfd, arrived, signals;
    long long worker, number, turn, inside, size, t0;
    double asked_at, heard, pool_heard, dead_at, kill_at, leave_at, serves;
    double linger, grace, timeout;
    size_t unread;
    bool forking, retired, finished, parked, stopping, greeted;
    char start_id[17];
    const char *agent;
} own = {-1, -1, -1, -1, -1, -1, -1, .dead_at = NEVER, .kill_at = NEVER, .leave_at = NEVER, .serves = -1, .size = -1};

static long long nanoseconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

static double seconds(void) { return (double)nanoseconds() / 1e9; }

static double earlier(double one, double other) { return one < other ? one : other; }

/* For poll: rounded up, so that what is due then is. */
static int milliseconds(double wait) { return wait > 0 ? (int)(wait * 1000) + 1 : 0; }

static void close_fd(int *fd) {
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
}

static void note(const char *name, long long start, long long end) {
    put(&spans, "%s[\"shim\",\"%s\",%lld,%lld]", spans.used ? "," : "", name, start, end);
    put(&phases, "%sshim %s %.0f", phases.used ? ", " : "", name, (double)(end - start) / 1e6);
}

_Noreturn static void leave(int code) {
    if (own.pidfd >= 0)
        syscall(SYS_pidfd_send_signal, own.pidfd, SIGKILL, NULL, 0);
    shutdown(own.listener, SHUT_RDWR); /* whoever opened it may still hold it: nobody is to wait on it for ever */
    _exit(code);
}

/* --- shim.py in our place ----------------------------------------------------------------------------------------- */

_Noreturn static void python(void) {
    char *const command[] = {PYTHON, "-P", "-m", "runtime.shim", NULL};
    execv(PYTHON, command);
    say("%s cannot be executed: %s; build this program for the Python that is there [function]", PYTHON,
        strerror(errno));
    leave(70);
}

static void put_fd(Text *text, const char *name, int fd) {
    put(text, ",\"%s\":%d", name, fd);
    if (fd >= 0)
        fcntl(fd, F_SETFD, 0);
}

static void put_time(Text *text, const char *name, double at) {
    if (at < NEVER)
        put(text, ",\"%s\":%.6f", name, at);
}

static const char *truth(bool value) { return value ? "true" : "false"; }

/* With all that there is, and why; signals stay blocked until it can take them. */
_Noreturn static void take_over(const char *why, bool ask_pool) {
    static char bytes[3 * LINE * 2 + 2 * NOTES];
    Text state = {bytes, 0, sizeof bytes, false};
    put(&state, "{\"why\":");
    put_string(&state, why, strlen(why));
    put(&state, ",\"ask_pool\":%s,\"greeted\":%s", truth(ask_pool), truth(own.greeted));
    put(&state, ",\"start_id\":\"%s\",\"spans\":[%s]", own.start_id, spans.at);
    put(&state, ",\"number\":%lld,\"turn\":%lld,\"worker\":%lld,\"agent\":", own.number, own.turn, own.worker);
    put_string(&state, own.agent, strlen(own.agent));
    put(&state, ",\"retired\":%s,\"finished\":%s", truth(own.retired), truth(own.finished));
    put(&state, ",\"parked\":%s,\"stopping\":%s", truth(own.parked), truth(own.stopping));
    put(&state, ",\"forking\":%s,\"known\":{\"load\":%lld", truth(own.forking), own.inside);
    put_time(&state, "serves", own.serves >= 0 ? own.serves : NEVER);
    if (own.size >= 0)
        put(&state, ",\"bytes\":%lld", own.size);
    put(&state, "},\"unread\":");
    put_string(&state, line_bytes, own.unread);
    put_time(&state, "asked_at", own.asked_at);
    put_time(&state, "heard", own.heard);
    put_time(&state, "kill_at", own.kill_at);
    put_time(&state, "leave_at", own.leave_at);
    put_fd(&state, "listener", own.listener);
    put_fd(&state, "pool", ask_pool ? own.pool : -1);
    put_fd(&state, "line", own.line);
    put_fd(&state, "theirs", own.theirs);
    put_fd(&state, "pidfd", own.pidfd);
    put_fd(&state, "arrived", own.arrived);
    put(&state, "}");
    int file = memfd_create("glowplug-shim", 0);
    char name[16];
    snprintf(name, sizeof name, "%d", file);
    if (state.over || file < 0 || write(file, bytes, state.used) != (ssize_t)state.used ||
        setenv("GLOWPLUG_SHIM_STATE", name, 1)) {
        say("shim.py cannot take over: no memory [function]");
        leave(70);
    }
    python();
}

/* --- the pool ----------------------------------------------------------------------------------------------------- */

/* Sends the packet and fds; false if it cannot be sent now. */
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
    Text text = {bytes, (size_t)count, sizeof bytes, false};
    (void)send_packet(&text, NULL, 0); /* a pool that does not read is soon silent, too */
}

/* Of a name that is there more than once the first one counts, as for getenv: what stands last wins in JSON. */
static void put_environment(Text *text) {
    size_t count = 0;
    while (environ[count])
        count++;
    put(text, "\"environment\":{\"GLOWPLUG_SOCKET\":");
    put_string(text, own.agent, strlen(own.agent));
    while (count-- > 0) {
        const char *equals = strchr(environ[count], '=');
        if (!equals || equals == environ[count] || !strncmp(environ[count], "GLOWPLUG_SOCKET=", 16))
            continue;
        put(text, ",");
        put_string(text, environ[count], (size_t)(equals - environ[count]));
        put(text, ":");
        put_string(text, equals + 1, strlen(equals + 1));
    }
    char cwd[4096];
    put(text, "},\"cwd\":");
    put_string(text, getcwd(cwd, sizeof cwd) ? cwd : "/", strlen(getcwd(cwd, sizeof cwd) ? cwd : "/"));
}

/* As own.py's: the digest of the locked base set. */
static void put_base(Text *text) {
    int file = open(LOCK, O_RDONLY | O_CLOEXEC);
    uint32_t sum = 0xFFFFFFFF;
    size_t size = 0;
    unsigned char bytes[4096];
    for (ssize_t count; file >= 0 && (count = read(file, bytes, sizeof bytes)) > 0; size += (size_t)count)
        for (ssize_t i = 0; i < count; i++) {
            sum ^= bytes[i];
            for (int bit = 0; bit < 8; bit++)
                sum = sum >> 1 ^ (sum & 1 ? 0xEDB88320 : 0);
        }
    put(text, file < 0 ? "\"base\":\"\"" : "\"base\":\"%08x-%zu\"", ~sum, size);
    close_fd(&file);
}

static void connect_pool(const char *path) {
    struct sockaddr_un name = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof name.sun_path)
        take_over("the path of the pool's socket is too long", true);
    strcpy(name.sun_path, path);
    own.pool = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    int room = 2 * PACKET;
    setsockopt(own.pool, SOL_SOCKET, SO_SNDBUF, &room, sizeof room);
    if (connect(own.pool, (struct sockaddr *)&name, sizeof name)) {
        close_fd(&own.pool);
        take_over("no pool answers", true); /* or it does by then */
    }
    struct utsname machine;
    uname(&machine);
    Text wants = {packet, 0, sizeof packet, false};
    put(&wants, "{\"wants\":{\"machine\":\"%s\",\"python\":\"" VERSION "\",", machine.machine);
    put_base(&wants);
    put(&wants, "},");
    put_environment(&wants);
    put(&wants, "}");
    if (!send_packet(&wants, NULL, 0)) {
        close_fd(&own.pool);
        take_over("the pool cannot be told", true);
    }
}

/* A worker is asked for: the listener, its end of a line, and a connection that has arrived go with it. */
static void ask(void) {
    long long start = nanoseconds();
    own.asked_at = own.heard = (double)start / 1e9;
    own.forking = true, own.parked = own.retired = own.finished = false;
    own.turn = own.inside = 0, own.serves = -1, own.size = -1, own.unread = 0;
    if (own.number++) { /* another start, with a ledger of its own */
        spans.used = phases.used = 0, spans.at[0] = phases.at[0] = 0, spans.over = phases.over = false;
        note("restart", start, start);
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
        put(&request, "{\"fork\":%lld,", own.number);
        put_environment(&request);
        put(&request, ",\"start_id\":\"%s\",\"spans\":", own.start_id);
        char rows[NOTES + 2];
        put_string(&request, rows, (size_t)snprintf(rows, sizeof rows, "[%s]", spans.at));
        put(&request, "}");
        asked = send_packet(&request, fds, (size_t)count);
    }
    if (!asked) {
        own.forking = false;
        close_fd(&own.line), close_fd(&own.theirs);
        take_over("the pool cannot be asked", true);
    }
    note("spawn", start, nanoseconds());
}

/* --- the worker --------------------------------------------------------------------------------------------------- */

static void signal_worker(int number) {
    if (own.pidfd >= 0)
        syscall(SYS_pidfd_send_signal, own.pidfd, number, NULL, 0);
}

static void hear_spans(const char *rows, const char *end) {
    const char *row;
    for (int i = 0; *rows == '[' && (row = member(rows, end, NULL, i)); i++) {
        const char *owner = *row == '[' ? member(row, end, NULL, 0) : NULL;
        const char *name = owner ? member(row, end, NULL, 1) : NULL;
        long long start, stop;
        if (!name || *owner != '"' || *name != '"' || !whole(member(row, end, NULL, 2), end, &start) ||
            !whole(member(row, end, NULL, 3), end, &stop) || member(row, end, NULL, 4))
            continue;
        Text before = spans;
        put(&spans, spans.used ? "," : "");
        put_bytes(&spans, row, (size_t)(after_value(row, end, DEPTH) - row));
        if (spans.over) /* half a row is none */
            spans.used = before.used, spans.at[spans.used] = 0;
        put(&phases, phases.used ? ", " : "");
        put_plain(&phases, owner);
        put(&phases, " ");
        put_plain(&phases, name);
        put(&phases, " %.0f", ((double)stop - (double)start) / 1e6);
    }
}

/* What the worker says; false if it is shim.py's to hear. */
static bool hear(const char *at, const char *end) {
    if (!object(at, end))
        return true; /* user code may have got hold of the line */
    const char *state = member(at, end, "state", 0), *load = member(at, end, "load", 0);
    const char *rows = member(at, end, "spans", 0), *error = member(at, end, "error", 0);
    const char *agent = member(at, end, "agent", 0);
    long long turn, inside, size;
    if (agent && *agent == '"')
        return false;
    own.heard = seconds();
    if (is(state, "ready")) {
        own.serves = own.heard - own.asked_at;
        say("ready after %.0f ms (%s)", (double)(nanoseconds() - own.t0) / 1e6, phases.at);
        tell_pool("{\"serves\":%.6f}", own.serves);
    } else if (is(state, "retired")) {
        own.retired = own.finished = true;
    } else if (is(state, "drained")) {
        own.finished = true;
    } else if (load && *load == '[' && whole(member(load, end, NULL, 0), end, &turn) &&
               whole(member(load, end, NULL, 1), end, &inside)) {
        if (turn > own.turn && inside >= 0 && !member(load, end, NULL, 2)) {
            own.turn = turn, own.inside = inside;
            tell_pool("{\"load\":%lld}", inside);
        }
    } else if (whole(member(at, end, "bytes", 0), end, &size) && size >= 0) {
        own.size = size;
        tell_pool("{\"bytes\":%lld}", size);
    }
    if (rows)
        hear_spans(rows, end);
    const char *code = error && *error == '[' ? member(error, end, NULL, 0) : NULL;
    const char *why = code ? member(error, end, NULL, 1) : NULL;
    if (why && *code == '"' && *why == '"' && !member(error, end, NULL, 2)) {
        char bytes[4000];
        Text text = {bytes, 0, sizeof bytes, false};
        put_plain(&text, why);
        put(&text, " [");
        put_plain(&text, code);
        put(&text, "]");
        say("%s", bytes);
    }
    return true;
}

static void read_line(int turns) {
    while (own.line >= 0 && turns-- > 0) {
        ssize_t count = recv(own.line, line_bytes + own.unread, sizeof line_bytes - own.unread, 0);
        if (count < 0 && (errno == EAGAIN || errno == EINTR))
            return;
        if (count <= 0) {
            close_fd(&own.line);
            return;
        }
        char *at = line_bytes, *end = line_bytes + own.unread + count, *stop;
        while ((stop = memchr(at, '\n', (size_t)(end - at)))) {
            if (!hear(at, stop)) {
                own.unread = (size_t)(end - at);
                memmove(line_bytes, at, own.unread);
                take_over("its worker asks for another agent", true);
            }
            at = stop + 1;
        }
        own.unread = (size_t)(end - at);
        memmove(line_bytes, at, own.unread);
        if (own.unread == sizeof line_bytes)
            own.unread = 0; /* longer than any message */
    }
}

/* It has ended like this; returns if a request will need another one. */
static void worker_ended(int status) {
    read_line(4 * TURNS);
    int code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
    if (own.retired && status == 0) {
        close_fd(&own.line), close_fd(&own.pidfd);
        own.worker = 0, own.parked = true, own.dead_at = NEVER;
        fcntl(own.listener, F_SETFL, fcntl(own.listener, F_GETFL) | O_NONBLOCK);
        tell_pool("{\"parked\":1}");
        say("the worker was idle and is gone; the next request starts another");
        return;
    }
    if (own.stopping)
        leave(code);
    if (WIFEXITED(status) && code >= 64 && code <= 69)
        leave(code);
    take_over("its worker crashed", true);
}

/* Takes a packet that was looked at, with the fd that may come with it, or -1. */
static int take_packet(void) {
    union {
        struct cmsghdr header;
        char space[CMSG_SPACE(sizeof(int))];
    } control;
    char byte;
    struct iovec bytes = {&byte, 1};
    struct msghdr message = {.msg_iov = &bytes, .msg_iovlen = 1};
    message.msg_control = &control, message.msg_controllen = sizeof control;
    int fd = -1;
    if (recvmsg(own.pool, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC) >= 0 && CMSG_FIRSTHDR(&message) &&
        control.header.cmsg_type == SCM_RIGHTS)
        memcpy(&fd, CMSG_DATA(&control.header), sizeof fd);
    return fd;
}

static void read_pool(void) {
    for (;;) {
        ssize_t count = recv(own.pool, packet, PACKET, MSG_PEEK | MSG_DONTWAIT);
        if (count < 0 && (errno == EAGAIN || errno == EINTR))
            return;
        const char *at = packet, *end = packet + (count > 0 ? count : 0);
        if (count <= 0 || !object(at, end))
            take_over("the pool is gone", true);
        own.pool_heard = seconds();
        const char *wish = member(at, end, "wish", 0);
        long long number, pid, status;
        if (member(at, end, "failed", 0))
            take_over("the pool does not serve it", true);
        if (own.forking && whole(member(at, end, "refused", 0), end, &number) && number == own.number)
            take_over("the pool refuses", true);
        bool forked = whole(member(at, end, "forked", 0), end, &number) && whole(member(at, end, "pid", 0), end, &pid);
        bool ended = whole(member(at, end, "ended", 0), end, &pid) && whole(member(at, end, "status", 0), end, &status);
        own.greeted |= member(at, end, "ready", 0) != NULL;
        if (ended && own.worker && pid == own.worker)
            worker_ended((int)status); /* takes over with the packet still there, unless it was to end */
        int fd = take_packet();
        if (forked && own.forking && number == own.number && fd >= 0) {
            own.pidfd = fd, own.worker = pid, own.forking = false, own.dead_at = NEVER;
            close_fd(&own.theirs), close_fd(&own.arrived);
            if (own.stopping)
                signal_worker(SIGTERM);
        } else {
            close_fd(&fd);
        }
        if (is(wish, "retire") && own.worker && own.line >= 0)
            (void)!send(own.line, "{\"retire\":1}\n", 13, MSG_DONTWAIT | MSG_NOSIGNAL);
    }
}

/* --- parked: as parked.py does ------------------------------------------------------------------------------------ */

static void receive(void) {
    int connection = accept4(own.listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
    if (connection < 0)
        return; /* it has gone away again */
    struct pollfd there = {connection, POLLIN, 0};
    poll(&there, 1, 50);
    char begin[65] = "";
    ssize_t count = recv(connection, begin, 64, MSG_PEEK);
    if (count < 0 && errno == EAGAIN)
        count = 64; /* somebody slow */
    static const char *const probes[][2] = {{"GET /_/health", "{\"status\":\"ok\"}\n"},
                                            {"GET /_/ready", "{\"state\":\"parked\"}\n"}};
    for (int i = 0; i < 2; i++) {
        size_t size = strlen(probes[i][0]);
        if (strncmp(begin, probes[i][0], size) || (begin[size] != ' ' && begin[size] != '?'))
            continue;
        (void)!recv(connection, packet, LINE, 0); /* what is left unread would reset the connection, with its answer */
        Text text = {packet, 0, sizeof packet, false};
        put(&text, "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n");
        put(&text, "Content-Length: %zu\r\nConnection: close\r\n\r\n%s", strlen(probes[i][1]), probes[i][1]);
        (void)!send(connection, text.at, text.used, MSG_NOSIGNAL);
        shutdown(connection, SHUT_WR);
        count = 0;
    }
    if (count <= 0) {
        close(connection);
        return;
    }
    own.arrived = connection;
    ask();
}

/* --- life --------------------------------------------------------------------------------------------------------- */

static void take_signals(void) {
    struct signalfd_siginfo signal;
    while (read(own.signals, &signal, sizeof signal) == sizeof signal) {
        if (signal.ssi_signo == SIGCHLD)
            continue;
        if (own.stopping && signal.ssi_signo == SIGINT)
            own.kill_at = 0;
        if (own.stopping)
            continue;
        own.stopping = true;
        own.leave_at = seconds() + own.linger;
        /* The worker keeps to the grace itself; this is for one that hangs. */
        own.kill_at = own.leave_at + own.grace + 5.0;
        signal_worker(SIGTERM);
    }
    int status;
    for (pid_t pid; (pid = waitpid(-1, &status, WNOHANG)) > 0;) /* what others left behind */
        if (own.worker && pid == own.worker)
            worker_ended(status);
}

static void enforce_deadlines(void) {
    double now = seconds();
    if (own.forking && now - own.asked_at > FORKED)
        take_over("the pool did not answer", true);
    if (now - own.pool_heard > SILENCE)
        take_over("the pool is silent", true);
    if (own.parked && own.stopping && now >= own.leave_at)
        leave(0);
    if (own.pidfd < 0)
        return;
    struct pollfd worker = {own.pidfd, POLLIN, 0};
    if (poll(&worker, 1, 0) > 0) {
        own.dead_at = earlier(own.dead_at, now);
        if (now - own.dead_at > ORPHAN)
            take_over("nobody tells how its worker ended", true);
    } else if (now >= own.kill_at) {
        say("the worker did not stop in time and is killed; raise GLOWPLUG_DRAIN_GRACE if its requests need longer");
        signal_worker(SIGKILL);
        own.kill_at = NEVER;
    } else if (now - own.heard > own.timeout) {
        say("the worker was silent for %.0f s and is killed", own.timeout);
        signal_worker(SIGKILL);
        own.heard = now;
    }
}

static void supervise(void) {
    for (;;) {
        double now = seconds(), until = now + 0.5;
        until = earlier(until, earlier(own.kill_at, own.parked && own.stopping ? own.leave_at : NEVER));
        /* A dead worker's pidfd stays readable: how it ended is the pool's to tell. */
        struct pollfd fds[] = {{own.pool, POLLIN, 0}, {own.signals, POLLIN, 0}, {own.line, POLLIN, 0},
                               {own.parked ? own.listener : -1, POLLIN, 0},
                               {own.dead_at < NEVER ? -1 : own.pidfd, POLLIN, 0}};
        int count = poll(fds, 5, milliseconds(until - now));
        if (count > 0 && fds[1].revents)
            take_signals();
        if (count > 0 && fds[2].revents)
            read_line(TURNS);
        read_pool();
        if (count > 0 && fds[3].revents && own.parked)
            receive();
        enforce_deadlines();
    }
}

/* --- settings, as config.py reads them; what is not understood is shim.py's ----------------------------------------- */

static const char *setting(const char *name, const char *otherwise) {
    const char *value = getenv(name);
    return value && *value ? value : otherwise;
}

static double number(const char *name, double otherwise, double least) {
    const char *text = setting(name, NULL);
    char *end;
    double value = text ? strtod(text, &end) : otherwise;
    if (text && (*end || text[strspn(text, "0123456789.")]))
        python();
    if (!(value >= least && value < 1e9))
        python();
    return value;
}

static void open_port(void) {
    const char *host = setting("GLOWPLUG_HOST", "0.0.0.0"), *port = setting("GLOWPLUG_PORT", setting("PORT", "8080"));
    const char *given = setting("GLOWPLUG_LISTEN_FD", NULL);
    char *end;
    long value = strtol(given ? given : port, &end, 10);
    if (*end || value < 0 || value > 65535 || (given ? given : port)[strspn(given ? given : port, "0123456789")])
        python();
    if (given) {
        int listening = 0;
        socklen_t size = sizeof listening;
        if (getsockopt((int)value, SOL_SOCKET, SO_ACCEPTCONN, &listening, &size) || !listening)
            python();
        own.listener = (int)value;
        fcntl(own.listener, F_SETFD, FD_CLOEXEC);
        return;
    }
    union {
        struct sockaddr any;
        struct sockaddr_in four;
        struct sockaddr_in6 six;
    } name = {.any = {.sa_family = strchr(host, ':') ? AF_INET6 : AF_INET}};
    bool six = name.any.sa_family == AF_INET6;
    *(six ? &name.six.sin6_port : &name.four.sin_port) = htons((uint16_t)value);
    if (inet_pton(name.any.sa_family, host, six ? (void *)&name.six.sin6_addr : (void *)&name.four.sin_addr) != 1)
        python();
    own.listener = socket(name.any.sa_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    int on = 1;
    setsockopt(own.listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(own.listener, &name.any, six ? sizeof name.six : sizeof name.four) || listen(own.listener, 1024)) {
        close_fd(&own.listener);
        python(); /* which says what is wrong */
    }
}

static bool answers(const char *path) {
    struct sockaddr_un name = {.sun_family = AF_UNIX};
    strncpy(name.sun_path, path, sizeof name.sun_path - 1);
    int probe = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    bool connected = probe >= 0 && !connect(probe, (struct sockaddr *)&name, sizeof name);
    close_fd(&probe);
    return connected;
}

/* When this process was made, to the kernel's clock tick; as children.py's. */
static long long executed_at(long long now) {
    char bytes[1024];
    int file = open("/proc/self/stat", O_RDONLY | O_CLOEXEC);
    ssize_t count = file < 0 ? 0 : read(file, bytes, sizeof bytes - 1);
    close_fd(&file);
    bytes[count > 0 ? count : 0] = 0;
    char *at = strrchr(bytes, ')');
    for (int i = 0; at && i < 20; i++)
        at = strchr(at + 1, ' ');
    struct timespec boot;
    clock_gettime(CLOCK_BOOTTIME, &boot);
    long long since_boot = boot.tv_sec * 1000000000LL + boot.tv_nsec - nanoseconds();
    long long made = at ? strtoll(at, NULL, 10) * (1000000000LL / sysconf(_SC_CLK_TCK)) - since_boot : now;
    return made < now ? made : now;
}

int main(void) {
    long long born = nanoseconds();
    const char *pool = setting("GLOWPLUG_POOL", "/run/glowplug/pool.sock");
    const char *layers = setting("GLOWPLUG_LAYERS", "model"), *model = setting("GLOWPLUG_MODEL", NULL);
    own.agent = setting("GLOWPLUG_SOCKET", "/run/glowplug/agent.sock");
    unsetenv("GLOWPLUG_SHIM_STATE");
    bool plain = model && (!strcmp(layers, "model") || !strcmp(layers, "lang")) && strncmp(own.agent, "tcp:", 4) &&
                 getpid() == 1 && !setting("GLOWPLUG_RELOAD", NULL) && !access(pool, F_OK);
    if (!plain || (!setting("GLOWPLUG_SOCKET", NULL) && !answers(own.agent)))
        python();
    own.linger = number("GLOWPLUG_DRAIN_LINGER", 0, 0);
    own.grace = number("GLOWPLUG_DRAIN_GRACE", 25, 0);
    own.timeout = number("GLOWPLUG_WORKER_TIMEOUT", 120, 1);
    open_port();
    setsockopt(own.listener, IPPROTO_TCP, TCP_NODELAY, &(int){1}, sizeof(int)); /* for TCP only: port.py says why */
    own.t0 = executed_at(born);
    note("exec", own.t0, born);
    note("listen", born, nanoseconds());
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGTERM), sigaddset(&set, SIGINT), sigaddset(&set, SIGCHLD);
    sigprocmask(SIG_BLOCK, &set, NULL);
    signal(SIGPIPE, SIG_IGN);
    own.signals = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
    prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0);
    connect_pool(pool);
    for (double until = seconds() + READY, now; !own.greeted && (now = seconds()) < until; read_pool()) {
        struct pollfd wire = {own.pool, POLLIN, 0};
        poll(&wire, 1, milliseconds(until - now));
    }
    if (!own.greeted)
        take_over("the pool has no zygote ready", false);
    own.pool_heard = seconds();
    struct sockaddr_in6 name;
    socklen_t size = sizeof name;
    getsockname(own.listener, (struct sockaddr *)&name, &size);
    say("port %d is open, starting %s%s", ntohs(name.sin6_port), *model == '/' ? "file://" : "", model);
    ask();
    supervise();
}
