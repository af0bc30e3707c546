/* The first process of a container in node mode: shim.py's work without an interpreter, while all goes as expected.

   This program opens the port, asks the node's pool for a worker, watches the worker, and answers probes while there is
   none. In every other case shim.py is executed in place of this program, in the same process, and takes over port,
   connections and worker (takeover.py). So nothing here starts a process, or decides anything.

       not plain node mode ─────────────────────────────────────────────────▶ shim.py, from its beginning
       asking ──forked──▶ serving ──retired──▶ standby ──a request──▶ asking
          any of them ──crash, refusal, silence, an unknown word────────────▶ shim.py, with all that is there

   A message of the pool is looked at before it is taken from the socket, so that shim.py finds there what this program
   leaves to it. The chapters, in the order in which they are read:

       shared.h    names, defaults, limits and texts of the shim in Python; written by native.py at the build
       text.h      text within bounds, and messages (messages.py)
       state.h     the state of this program; its clock, log and ledger; its two ends
       pool.h      packets to the pool (wire.py)
       shim.c      the worker's line (control.py), the pool's answers, standby, signals, deadlines; settings and main */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/wait.h>

#include "shared.h"
#include "text.h"
#include "state.h"
#include "pool.h"

enum { TURNS = 16 }; /* reads of the line before other events have their turn */

/* --- the worker --------------------------------------------------------------------------------------------------- */

static void hear_span(char *row) {
    long long start, end;
    char *what = span(row, &start, &end);
    if (what)
        add_span(start, end, plain(what));
}

/* Hears a message of the worker, at..end; false for one that is left to shim.py. */
static bool hear(char *at, const char *end) {
    if (at == end || end[-1])
        return true; /* no message: user code may have got hold of the line */
    if (field(at, end, "agent"))
        return false;
    char *state = field(at, end, "state"), *error = field(at, end, "error"), *text = field(at, end, "text");
    long long turn, inside, size;
    own.heard = seconds();
    if (is(state, "ready")) {
        own.serves = own.heard - own.asked_at;
        say_ready();
        tell_pool("serves=%.6f", own.serves);
    } else if (is(state, "retired")) {
        own.retired = own.finished = true;
    } else if (is(state, "drained")) {
        own.finished = true;
    } else if (whole(field(at, end, "load"), &inside) && whole(field(at, end, "turn"), &turn)) {
        if (turn > own.turn && inside >= 0) {
            own.turn = turn, own.inside = inside;
            tell_pool("load=%lld", inside);
        }
    } else if (whole(field(at, end, "bytes"), &size) && size >= 0) {
        own.size = size;
        tell_pool("bytes=%lld", size);
    }
    for (char *row = at; (row = field(row, end, "span")); row += strlen(row) + 1)
        hear_span(row);
    if (error && text)
        say("%s [%s]", plain(text), plain(error));
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
            own.unread = 0; /* longer than any message may be */
    }
}

/* Ends the container, or goes on standby and returns, or leaves the container to shim.py. */
static void worker_ended(int status) {
    read_line(4 * TURNS);
    int code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
    if (own.retired && status == 0) {
        close_fd(&own.line), close_fd(&own.pidfd);
        own.worker = 0, own.standby = true, own.dead_at = NEVER;
        fcntl(own.listener, F_SETFL, fcntl(own.listener, F_GETFL) | O_NONBLOCK);
        tell_pool("parked=1");
        say("%s", SAYS_STANDBY);
        return;
    }
    if (own.stopping)
        leave(code);
    if (WIFEXITED(status) && code >= REPORTED_FIRST && code <= REPORTED_LAST)
        leave(code);
    take_over("its worker crashed", true);
}

/* Takes from the socket a packet that was looked at; returns the fd that came with the packet, or -1. */
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
    static const char retire[] = "retire=1\0\n";
    for (;;) {
        ssize_t count = recv(own.pool, packet, MAX_PACKET, MSG_PEEK | MSG_DONTWAIT);
        if (count < 0 && (errno == EAGAIN || errno == EINTR))
            return;
        if (count <= 0 || packet[count - 1])
            take_over("the pool is gone", true);
        own.pool_heard = seconds();
        const char *end = packet + count;
        const char *wish = field(packet, end, "wish");
        long long number = 0, pid = 0, status = 0;
        if (field(packet, end, "failed"))
            take_over("the pool does not serve it", true);
        if (own.forking && whole(field(packet, end, "refused"), &number) && number == own.number)
            take_over("the pool refuses", true);
        bool forked = whole(field(packet, end, "forked"), &number) && whole(field(packet, end, "pid"), &pid);
        bool ended = whole(field(packet, end, "ended"), &pid) && whole(field(packet, end, "status"), &status);
        own.greeted |= field(packet, end, "ready") != NULL;
        if (ended && own.worker && pid == own.worker)
            worker_ended((int)status); /* a hand-over leaves the packet where it is: shim.py needs the status, too */
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
            (void)!send(own.line, retire, sizeof retire - 1, MSG_DONTWAIT | MSG_NOSIGNAL);
    }
}

/* --- standby: as standby.py does -------------------------------------------------------------------------------- */

static void receive(void) {
    int connection = accept4(own.listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
    if (connection < 0)
        return; /* the client has gone away again */
    struct pollfd there = {connection, POLLIN, 0};
    poll(&there, 1, PROBE_MS);
    char begin[PROBE_BYTES + 1] = "";
    ssize_t count = recv(connection, begin, PROBE_BYTES, MSG_PEEK);
    if (count < 0 && errno == EAGAIN)
        count = PROBE_BYTES; /* a slow client */
    static const char *const probes[][2] = {PROBES};
    for (size_t i = 0; i < sizeof probes / sizeof *probes; i++) {
        size_t size = strlen(probes[i][0]);
        if (strncmp(begin, probes[i][0], size) || (begin[size] != ' ' && begin[size] != '?'))
            continue;
        (void)!recv(connection, packet, MAX_LINE, 0); /* unread bytes would reset the connection, answer included */
        Text text = {packet, 0, sizeof packet, false};
        put(&text, PROBE_HEAD "%s", (int)strlen(probes[i][1]), probes[i][1]);
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
        /* The worker keeps to the grace by itself; the deadline is for a worker that hangs. */
        own.kill_at = own.leave_at + own.grace + HANG_SECONDS;
        signal_worker(SIGTERM);
    }
    int status;
    for (pid_t pid; (pid = waitpid(-1, &status, WNOHANG)) > 0;) /* orphans of the container, too */
        if (own.worker && pid == own.worker)
            worker_ended(status);
}

static void enforce_deadlines(void) {
    double now = seconds();
    if (own.forking && now - own.asked_at > FORK_SECONDS)
        take_over("the pool did not answer", true);
    if (now - own.pool_heard > SILENCE_SECONDS)
        take_over("the pool is silent", true);
    if (own.standby && own.stopping && now >= own.leave_at)
        leave(0);
    if (own.pidfd < 0)
        return;
    struct pollfd worker = {own.pidfd, POLLIN, 0};
    if (poll(&worker, 1, 0) > 0) {
        own.dead_at = earlier(own.dead_at, now);
        if (now - own.dead_at > ORPHAN_SECONDS)
            take_over("nobody tells how its worker ended", true);
    } else if (now >= own.kill_at) {
        say("%s", SAYS_STUCK);
        signal_worker(SIGKILL);
        own.kill_at = NEVER;
    } else if (now - own.heard > own.timeout) {
        say(SAYS_SILENT, own.timeout);
        signal_worker(SIGKILL);
        own.heard = now;
    }
}

static void supervise(void) {
    for (;;) {
        double now = seconds(), until = now + 0.5;
        until = earlier(until, earlier(own.kill_at, own.standby && own.stopping ? own.leave_at : NEVER));
        /* A dead worker's pidfd stays readable, and would end every wait until the pool tells the worker's status. */
        struct pollfd fds[] = {{own.pool, POLLIN, 0}, {own.signals, POLLIN, 0}, {own.line, POLLIN, 0},
                               {own.standby ? own.listener : -1, POLLIN, 0},
                               {own.dead_at < NEVER ? -1 : own.pidfd, POLLIN, 0}};
        int count = poll(fds, 5, milliseconds(until - now));
        if (count > 0 && fds[1].revents)
            take_signals();
        if (count > 0 && fds[2].revents)
            read_line(TURNS);
        read_pool();
        if (count > 0 && fds[3].revents && own.standby)
            receive();
        enforce_deadlines();
    }
}

/* --- settings, as config.py reads them; what is not understood is left to shim.py -------------------------------- */

static const char *setting(const char *name, const char *otherwise) {
    const char *value = getenv(name);
    return value && *value ? value : otherwise;
}

#define SETTING(name) setting(NAME_##name, DEFAULT_##name)

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

#define NUMBER(name) number(NAME_##name, DEFAULT_##name, LEAST_##name)

static void open_port(void) {
    const char *host = SETTING(HOST), *given = setting(NAME_LISTEN_FD, NULL);
    long long value;
    if (!whole(given ? given : setting(NAME_PORT, setting("PORT", DEFAULT_PORT)), &value) || value < 0 || value > 65535)
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
    if (bind(own.listener, &name.any, six ? sizeof name.six : sizeof name.four) || listen(own.listener, BACKLOG)) {
        close_fd(&own.listener);
        python(); /* shim.py says what is wrong */
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

/* The time at which this process was executed, to the kernel's clock tick; as in children.py. */
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
    const char *pool = SETTING(POOL), *layers = SETTING(LAYERS), *model = SETTING(MODEL);
    own.agent = setting(NAME_SOCKET, AGENT_SOCKET);
    unsetenv(STATE);
    bool plain_mode = *model && (!strcmp(layers, "model") || !strcmp(layers, "lang")) &&
                      strncmp(own.agent, "tcp:", 4) && getpid() == 1 && !setting(NAME_RELOAD, NULL) &&
                      !access(pool, F_OK);
    if (!plain_mode || (!setting(NAME_SOCKET, NULL) && !answers(own.agent)))
        python();
    own.linger = NUMBER(DRAIN_LINGER);
    own.grace = NUMBER(DRAIN_GRACE);
    own.timeout = NUMBER(WORKER_TIMEOUT);
    open_port();
    setsockopt(own.listener, IPPROTO_TCP, TCP_NODELAY, &(int){1}, sizeof(int)); /* for TCP only: port.py says why */
    own.t0 = executed_at(born);
    add_span(own.t0, born, "shim exec");
    add_span(born, nanoseconds(), "shim listen");
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGTERM), sigaddset(&set, SIGINT), sigaddset(&set, SIGCHLD);
    sigprocmask(SIG_BLOCK, &set, NULL);
    signal(SIGPIPE, SIG_IGN);
    own.signals = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
    prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0);
    connect_pool(pool);
    for (double until = seconds() + POOL_SECONDS, now; !own.greeted && (now = seconds()) < until; read_pool()) {
        struct pollfd wire = {own.pool, POLLIN, 0};
        poll(&wire, 1, milliseconds(until - now));
    }
    if (!own.greeted)
        take_over("the pool has no zygote ready", false);
    own.pool_heard = seconds();
    struct sockaddr_in6 name;
    socklen_t size = sizeof name;
    getsockname(own.listener, (struct sockaddr *)&name, &size);
    char uri[3900];
    snprintf(uri, sizeof uri, "%s%s", *model == '/' ? "file://" : "", model);
    say(SAYS_OPEN, ntohs(name.sin6_port), uri);
    ask();
    supervise();
}
