/* The state of the static shim; its clock, its log and its ledger; the two ways in which it ends. Part of shim.c. */

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define NEVER 1e18 /* seconds */

static struct {
    int listener, pool, line, theirs, pidfd, arrived, signals;
    long long worker, number, turn, inside, size, t0;
    double asked_at, heard, pool_heard, dead_at, kill_at, leave_at, serves;
    double linger, grace, timeout;
    size_t unread;
    bool forking, retired, finished, standby, stopping, greeted;
    char start_id[17];
    const char *agent;
} own = {-1, -1, -1, -1, -1, -1, -1, .dead_at = NEVER, .kill_at = NEVER, .leave_at = NEVER, .serves = -1, .size = -1};

static char packet[MAX_PACKET + 1], line_bytes[MAX_LINE], span_bytes[16 << 10];
static Text spans = {span_bytes, 0, sizeof span_bytes, false}; /* the ledger, as fields of a message */

/* --- clock -------------------------------------------------------------------------------------------------------- */

static long long nanoseconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

static double seconds(void) { return (double)nanoseconds() / 1e9; }

static double earlier(double one, double other) { return one < other ? one : other; }

/* A wait for poll, rounded up: a deadline has passed when poll returns. */
static int milliseconds(double wait) { return wait > 0 ? (int)(wait * 1000) + 1 : 0; }

/* --- log and ledger ----------------------------------------------------------------------------------------------- */

__attribute__((format(printf, 1, 2))) static void say(const char *format, ...) {
    char bytes[4096] = "glowplug: "; /* for one write: lines of several processes share this stream */
    size_t begin = strlen(bytes), room = sizeof bytes - begin - 1;
    va_list values;
    va_start(values, format);
    int count = vsnprintf(bytes + begin, room, format, values);
    va_end(values);
    size_t size = begin + (count < 0 ? 0 : (size_t)count < room ? (size_t)count : room - 1);
    bytes[size++] = '\n';
    (void)!write(2, bytes, size);
}

/* Adds a row to the ledger; `what` is owner and name, with a space between them. */
static void add_span(long long start, long long end, const char *what) {
    put_field(&spans, "span=%lld %lld %s", start, end, what);
}

static void say_ready(void) {
    char bytes[4000] = "";
    Text phases = {bytes, 0, sizeof bytes, false};
    long long start, end;
    for (char *row = spans.at, *what; (row = field(row, spans.at + spans.used, "span")); row += strlen(row) + 1)
        if ((what = span(row, &start, &end)))
            put(&phases, "%s%s %.0f", phases.used ? ", " : "", what, (double)(end - start) / 1e6);
    say(SAYS_READY, (double)(nanoseconds() - own.t0) / 1e6, bytes);
}

/* --- the end: of the container, or shim.py in our place ----------------------------------------------------------- */

static void close_fd(int *fd) {
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
}

static void signal_worker(int number) {
    if (own.pidfd >= 0)
        syscall(SYS_pidfd_send_signal, own.pidfd, number, NULL, 0);
}

_Noreturn static void leave(int code) {
    signal_worker(SIGKILL);
    shutdown(own.listener, SHUT_RDWR); /* another process may still hold it: no client is to wait on it for ever */
    _exit(code);
}

_Noreturn static void python(void) {
    char *const command[] = {PYTHON, "-P", "-m", "runtime.shim", NULL};
    execv(PYTHON, command);
    say("%s cannot be executed: %s; build this program for the Python that is there [function]", PYTHON,
        strerror(errno));
    leave(EXIT_FAILED);
}

static void hand_fd(Text *state, const char *name, int fd) {
    put_field(state, "%s=%d", name, fd);
    if (fd >= 0)
        fcntl(fd, F_SETFD, 0);
}

static void hand_time(Text *state, const char *name, double at) {
    if (at < NEVER)
        put_field(state, "%s=%.6f", name, at);
}

/* Leaves shim.py the whole state, and the reason, as takeover.py reads them. Signals stay blocked: none is lost. */
_Noreturn static void take_over(const char *why, bool ask_pool) {
    static char bytes[sizeof packet + sizeof span_bytes + sizeof line_bytes];
    Text state = {bytes, 0, sizeof bytes, false};
    put_field(&state, "why=%s", why);
    put_field(&state, "ask_pool=%d", ask_pool);
    put_field(&state, "greeted=%d", own.greeted);
    put_field(&state, "start_id=%s", own.start_id);
    put_bytes(&state, spans.at, spans.used);
    put_field(&state, "number=%lld", own.number);
    put_field(&state, "turn=%lld", own.turn);
    put_field(&state, "worker=%lld", own.worker);
    put_field(&state, "agent=%s", own.agent);
    put_field(&state, "retired=%d", own.retired);
    put_field(&state, "finished=%d", own.finished);
    put_field(&state, "parked=%d", own.standby);
    put_field(&state, "stopping=%d", own.stopping);
    put_field(&state, "forking=%d", own.forking);
    put_field(&state, "load=%lld", own.inside);
    if (own.size >= 0)
        put_field(&state, "bytes=%lld", own.size);
    hand_time(&state, "serves", own.serves >= 0 ? own.serves : NEVER);
    hand_time(&state, "asked_at", own.asked_at);
    hand_time(&state, "heard", own.heard);
    hand_time(&state, "kill_at", own.kill_at);
    hand_time(&state, "leave_at", own.leave_at);
    hand_fd(&state, "listener", own.listener);
    hand_fd(&state, "pool", ask_pool ? own.pool : -1);
    hand_fd(&state, "line", own.line);
    hand_fd(&state, "theirs", own.theirs);
    hand_fd(&state, "pidfd", own.pidfd);
    hand_fd(&state, "arrived", own.arrived);
    put_field(&state, "%s", "");
    put_bytes(&state, line_bytes, own.unread);
    int file = memfd_create("glowplug-shim", 0);
    char name[16];
    snprintf(name, sizeof name, "%d", file);
    if (state.over || file < 0 || write(file, bytes, state.used) != (ssize_t)state.used || setenv(STATE, name, 1)) {
        say("shim.py cannot take over: no memory [function]");
        leave(EXIT_FAILED);
    }
    python();
}
