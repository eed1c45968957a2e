/* Libraries of Debian's that do what programs do. */
#include "workloads.h"
#include <lauxlib.h>
#include <lua.h>
#include <lualib.h>
#include <regex.h>
#include <sqlite3.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <zlib.h>

static char text[32768];
static uint8_t packed[65536];

/* Words in no order. */
static void make_text(void) {
    static const char *const words[] = {"guest ", "memory ", "of ", "the ", "block ", "register\n", "page ", "a "};
    uint64_t s = 11;
    char *p = text;
    if (text[0])
        return;
    while (p < text + sizeof text - 16)
        p = stpcpy(p, words[next_number(&s) & 7]);
}

static uLong pack(void) {
    uLong size = sizeof packed;
    compress2(packed, &size, (const Bytef *)text, sizeof text, 6);
    return size;
}
static uint64_t deflate_text(uint64_t n) {
    uint64_t sum = 0;
    make_text();
    while (n--)
        sum += pack() + packed[100];
    return sum;
}
static uint64_t inflate_text(uint64_t n) {
    static uint8_t out[sizeof text];
    uint64_t sum = 0;
    make_text();
    uLong size = pack();
    while (n--) {
        uLong got = sizeof out;
        uncompress(out, &got, packed, size);
        sum += got + out[n & 1023];
    }
    return sum;
}

static int count_row(void *sum, int columns, char **value, char **name) {
    (void)columns, (void)name;
    *(uint64_t *)sum += value[0] ? strtoull(value[0], 0, 10) : 1;
    return 0;
}
static uint64_t sqlite(uint64_t n) {
    uint64_t sum = 0;
    char line[160];
    sqlite3 *db;
    sqlite3_open(":memory:", &db);
    sqlite3_exec(db, "create table t(a integer primary key, b integer, c text); create index i on t(b)", 0, 0, 0);
    while (n--) {
        sqlite3_exec(db, "begin", 0, 0, 0);
        for (int i = 0; i < 40; i++) {
            snprintf(line, sizeof line, "insert into t(b, c) values(%d, 'row number %d')", i * 37 % 19, i);
            sqlite3_exec(db, line, 0, 0, 0);
        }
        sqlite3_exec(db, "select sum(a) from t where b between 3 and 9 group by b order by c", count_row, &sum, 0);
        sqlite3_exec(db, "delete from t; commit", 0, 0, 0);
    }
    sqlite3_close(db);
    return sum;
}

static uint64_t lua(uint64_t n, const char *source) {
    lua_State *l = luaL_newstate();
    luaL_openlibs(l);
    if (luaL_dostring(l, source))
        return 0;
    lua_getglobal(l, "run");
    lua_pushinteger(l, n);
    lua_call(l, 1, 1);
    uint64_t sum = lua_tointeger(l, -1);
    lua_close(l);
    return sum;
}
static uint64_t lua_calls(uint64_t n) {
    return lua(n, "local function f(x) if x < 2 then return x end return f(x - 1) + f(x - 2) end\n"
                  "function run(n) local s = 0 for i = 1, n do s = s + f(14) end return s end");
}
static uint64_t lua_tables(uint64_t n) {
    return lua(n, "function run(n) local s = 0 for i = 1, n do local t = {} for j = 1, 100 do\n"
                  "t[#t + 1] = 'k' .. j * 7 % 31 end table.sort(t) for k, v in ipairs(t) do s = s + #v + k end\n"
                  "end return s end");
}

static uint64_t regex(uint64_t n) {
    regex_t r;
    regmatch_t match;
    uint64_t sum = 0;
    make_text();
    regcomp(&r, "(guest|block) (memory )?[a-p]+ the", REG_EXTENDED);
    while (n--)
        for (const char *p = text + (n & 255); p < text + 4096 && !regexec(&r, p, 1, &match, 0); p += match.rm_eo)
            sum += match.rm_eo;
    regfree(&r);
    return sum;
}

static uint64_t print_numbers(uint64_t n) {
    char line[200];
    uint64_t sum = 0;
    while (n--)
        sum += snprintf(line, sizeof line, "%d %s %llx %8.3f %c", (int)n, "text", 123456789ull * n, n / 3.0, 'c');
    return sum;
}

const struct workload application[] = {
    {"application", "deflate", deflate_text}, {"application", "inflate", inflate_text},
    {"application", "sqlite", sqlite}, {"application", "lua-calls", lua_calls},
    {"application", "lua-tables", lua_tables}, {"application", "regex", regex},
    {"application", "printf", print_numbers}, {0},
};
