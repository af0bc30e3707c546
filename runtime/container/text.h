/* Text within bounds, and messages as messages.py draws them: fields `name=value`, each ended by a NUL. Part of shim.c. */

#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Text is `over` once something has not fitted. Nothing is added from then on: half a message is never sent. */
typedef struct {
    char *at;
    size_t used, size;
    bool over;
} Text;

static void put_bytes(Text *text, const char *bytes, size_t count) {
    text->over |= count > text->size - text->used;
    if (text->over)
        return;
    memcpy(text->at + text->used, bytes, count);
    text->used += count;
}

__attribute__((format(printf, 2, 3))) static void put(Text *text, const char *format, ...) {
    size_t room = text->size - text->used;
    va_list values;
    va_start(values, format);
    int count = text->over ? -1 : vsnprintf(text->at + text->used, room, format, values);
    va_end(values);
    text->over |= count < 0 || (size_t)count >= room;
    text->used += text->over ? 0 : (size_t)count;
}

/* Adds a field, or a variable of an environment. An empty field is the mark between the two. */
#define put_field(text, ...) (put(text, __VA_ARGS__), put_bytes(text, "", 1))

/* --- a message that was received, at..end; its last byte is a NUL ------------------------------------------------- */

/* The value of the first field of this name, or NULL. */
static char *field(char *at, const char *end, const char *name) {
    size_t size = strlen(name);
    for (; at < end && *at; at += strlen(at) + 1)
        if (!strncmp(at, name, size) && at[size] == '=')
            return at + size + 1;
    return NULL;
}

static bool is(const char *value, const char *word) { return value && !strcmp(value, word); }

/* The length of the whole number that begins here, of at most 18 digits, as in messages.py; 0 if there is none. */
static size_t number_bytes(const char *at, long long *number) {
    size_t sign = *at == '-', digits = strspn(at + sign, "0123456789");
    if (digits == 0 || digits > 18)
        return 0;
    *number = strtoll(at, NULL, 10);
    return sign + digits;
}

/* Whether the value is there, and a whole number. */
static bool whole(const char *value, long long *number) {
    size_t size = value ? number_bytes(value, number) : 0;
    return size && !value[size];
}

/* Owner and name in `START END OWNER NAME`, NULL if the value is no such span. */
static char *span(char *value, long long *start, long long *end) {
    size_t first = number_bytes(value, start), second = 0;
    if (first && value[first] == ' ')
        second = number_bytes(value + first + 1, end);
    if (!second || value[first + 1 + second] != ' ')
        return NULL;
    char *owner = value + first + second + 2, *name = strchr(owner, ' ');
    return name && name > owner && name[1] ? owner : NULL;
}

/* Replaces, in place, what a terminal would obey; a vertical tab stands for a line feed, see control.py. */
static char *plain(char *text) {
    for (char *at = text; *at; at++)
        if (*at == '\v')
            *at = '\n';
        else if (((unsigned char)*at < 0x20 && *at != '\t') || *at == 0x7F)
            *at = ' ';
    return text;
}
