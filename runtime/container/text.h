/* Text within bounds, and JSON: strings of any bytes are written, objects are looked at where they lie. Of shim.c. */

#include <errno.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { DEPTH = 32 };

/* --- text: bounded, and too much of it is remembered ------------------------------------------------------------- */

typedef struct {
    char *at;
    size_t used, size;
    bool over;
} Text;

static void put_bytes(Text *text, const char *bytes, size_t count) {
    if (text->over || count >= text->size - text->used) {
        text->over = true;
        return;
    }
    memcpy(text->at + text->used, bytes, count);
    text->used += count;
    text->at[text->used] = 0;
}

__attribute__((format(printf, 2, 3))) static void put(Text *text, const char *format, ...) {
    va_list values;
    va_start(values, format);
    int count = vsnprintf(text->at + text->used, text->size - text->used, format, values);
    va_end(values);
    if (count < 0 || (size_t)count >= text->size - text->used)
        text->over = true, text->at[text->used] = 0;
    else
        text->used += (size_t)count;
}

/* Bytes of the well-formed character of UTF-8 that begins here, 0 if none does. */
static size_t character(const unsigned char *at, size_t left) {
    size_t count = at[0] < 0x80 ? 1 : at[0] >= 0xC2 && at[0] < 0xE0 ? 2 : (at[0] & 0xF0) == 0xE0 ? 3
                   : at[0] >= 0xF0 && at[0] < 0xF5 ? 4 : 0;
    if (count > left)
        return 0;
    for (size_t i = 1; i < count; i++)
        if ((at[i] & 0xC0) != 0x80)
            return 0;
    if ((at[0] == 0xE0 && at[1] < 0xA0) || (at[0] == 0xED && at[1] >= 0xA0) || (at[0] == 0xF0 && at[1] < 0x90) ||
        (at[0] == 0xF4 && at[1] >= 0x90))
        return 0; /* longer than needed, half of a pair, or beyond the last */
    return count;
}

/* A JSON string of any bytes; those that are no UTF-8 become what Python's surrogateescape makes of them. */
static void put_string(Text *text, const char *bytes, size_t count) {
    put(text, "\"");
    for (size_t i = 0, more; i < count; i += more) {
        const unsigned char *at = (const unsigned char *)bytes + i;
        more = character(at, count - i);
        if (more == 0)
            put(text, "\\udc%02x", at[0]), more = 1;
        else if (*at < 0x20 || *at == '"' || *at == '\\' || *at == 0x7F)
            put(text, "\\u%04x", *at);
        else
            put_bytes(text, (const char *)at, more);
    }
    put(text, "\"");
}

/* --- JSON: a scanner; NULL is for what is none -------------------------------------------------------------------- */

static const char *blank(const char *at, const char *end) {
    while (at < end && (*at == ' ' || *at == '\t' || *at == '\n' || *at == '\r'))
        at++;
    return at;
}

static const char *after_string(const char *at, const char *end) {
    for (at++; at < end; at++) {
        if (*at == '"')
            return at + 1;
        if ((unsigned char)*at < 0x20)
            return NULL;
        if (*at != '\\')
            continue;
        if (++at == end || !strchr("\"\\/bfnrtu", *at) || !*at)
            return NULL;
        if (*at == 'u')
            for (int i = 0; i < 4; i++)
                if (++at >= end || !*at || !strchr("0123456789abcdefABCDEF", *at))
                    return NULL;
    }
    return NULL;
}

static const char *digits(const char *at, const char *end) {
    const char *begin = at;
    while (at < end && *at >= '0' && *at <= '9')
        at++;
    return at == begin ? NULL : at;
}

static const char *after_number(const char *at, const char *end) {
    if (at < end && *at == '-')
        at++;
    if (at < end && *at == '0')
        at++;
    else if (!(at = digits(at, end)))
        return NULL;
    if (at < end && *at == '.' && !(at = digits(at + 1, end)))
        return NULL;
    if (at < end && (*at == 'e' || *at == 'E')) {
        at++;
        at = digits(at + (at < end && (*at == '+' || *at == '-')), end);
    }
    return at;
}

static const char *after_value(const char *at, const char *end, int depth) {
    if (at == end || depth == 0)
        return NULL;
    if (*at == '"')
        return after_string(at, end);
    if (*at == '[' || *at == '{') {
        bool object = *at == '{';
        char close = object ? '}' : ']';
        at = blank(at + 1, end);
        if (at < end && *at == close)
            return at + 1;
        while (at < end) {
            if (object) {
                if (*at != '"' || !(at = after_string(at, end)) || (at = blank(at, end)) == end || *at != ':')
                    return NULL;
                at = blank(at + 1, end);
            }
            if (!(at = after_value(at, end, depth - 1)) || (at = blank(at, end)) == end)
                return NULL;
            if (*at == close)
                return at + 1;
            if (*at != ',')
                return NULL;
            at = blank(at + 1, end);
        }
        return NULL;
    }
    static const char *const words[] = {"true", "false", "null"};
    for (int i = 0; i < 3; i++)
        if ((size_t)(end - at) >= strlen(words[i]) && !memcmp(at, words[i], strlen(words[i])))
            return at + strlen(words[i]);
    return after_number(at, end);
}

/* Whether the bytes are one object of well-formed text. */
static bool object(const char *at, const char *end) {
    for (const char *each = at; each < end;) {
        size_t more = character((const unsigned char *)each, (size_t)(end - each));
        if (more == 0)
            return false;
        each += more;
    }
    at = blank(at, end);
    return at < end && *at == '{' && (at = after_value(at, end, DEPTH)) && blank(at, end) == end;
}

/* The value of a well-formed object's member, NULL if it has none; in an array that of an index, with `name` NULL. */
static const char *member(const char *at, const char *end, const char *name, int index) {
    const char *found = NULL;
    char close = name ? '}' : ']';
    at = blank(blank(at, end) + 1, end);
    while (*at != close) {
        bool mine = index-- == 0;
        if (name) {
            const char *key = at + 1;
            at = after_string(at, end);
            mine = (size_t)(at - 1 - key) == strlen(name) && !memcmp(key, name, strlen(name));
            at = blank(blank(at, end) + 1, end);
        }
        found = mine ? at : found;
        at = blank(after_value(at, end, DEPTH), end);
        at = *at == ',' ? blank(at + 1, end) : at;
    }
    return found;
}

static bool whole(const char *at, const char *end, long long *value) {
    if (!at || (*at != '-' && (*at < '0' || *at > '9')))
        return false;
    char *stop;
    errno = 0;
    *value = strtoll(at, &stop, 10);
    return errno == 0 && stop == after_number(at, end);
}

static bool is(const char *at, const char *word) {
    return at && *at == '"' && !strncmp(at + 1, word, strlen(word)) && at[1 + strlen(word)] == '"';
}

static unsigned hex(const char *at) {
    char four[5] = {at[0], at[1], at[2], at[3], 0};
    return (unsigned)strtoul(four, NULL, 16);
}

/* A well-formed string's characters, without those that a terminal would obey. */
static void put_plain(Text *text, const char *at) {
    for (at++; *at != '"'; at++) {
        unsigned code = (unsigned char)*at;
        if (code == '\\') {
            static const char names[] = "bfnrt\"\\/", values[] = "  \n \t\"\\/";
            const char *name = strchr(names, *++at);
            code = name ? (unsigned char)values[name - names] : hex(at + 1);
            at += name ? 0 : 4;
            if (code >= 0xD800 && code < 0xDC00 && at[1] == '\\' && at[2] == 'u' && hex(at + 3) >> 10 == 0x37)
                code = 0x10000 + ((code - 0xD800) << 10) + (hex(at + 3) & 0x3FF), at += 6;
        } else if (code >= 0x80) {
            put_bytes(text, at, 1);
            continue;
        }
        if (code >= 0xD800 && code < 0xE000)
            code = 0xFFFD;
        if ((code < 0x20 && code != '\n' && code != '\t') || code == 0x7F)
            code = ' ';
        unsigned char bytes[4] = {(unsigned char)code};
        size_t count = code < 0x80 ? 1 : code < 0x800 ? 2 : code < 0x10000 ? 3 : 4;
        for (size_t i = count; count > 1 && i-- > 0; code >>= 6)
            bytes[i] = (unsigned char)(i ? 0x80 | (code & 0x3F) : code | (0xF00u >> count & 0xFF));
        put_bytes(text, (const char *)bytes, count);
    }
}
