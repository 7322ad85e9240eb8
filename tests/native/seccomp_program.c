/* seccomp_program.c - prints the filters that seccomp.c makes; built and run by
 * test_seccomp_program.py, which then tries every call on them.
 *
 * seccomp_program closed FLAGS | loading
 *
 * seccomp.c is compiled with `syscall` renamed to the function below, so that nothing is closed, and
 * `getpid` to one whose answer the tests know. */
#include "pyenclave/linux.h"

#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <unistd.h>

long captured_syscall(long number, ...);
pid_t captured_getpid(void);

pid_t captured_getpid(void)
{
    return 4242;
}

long captured_syscall(long number, ...)
{
    const struct sock_fprog *program;
    va_list arguments;

    va_start(arguments, number);
    if (number != SYS_seccomp || va_arg(arguments, unsigned int) != SECCOMP_SET_MODE_FILTER) {
        exit(3);
    }
    if (va_arg(arguments, unsigned int) != SECCOMP_FILTER_FLAG_TSYNC) {
        exit(4);
    }
    program = va_arg(arguments, const struct sock_fprog *);
    for (unsigned short i = 0; i < program->len; i++) {
        const struct sock_filter *step = &program->filter[i];
        printf("%u %u %u %u\n", step->code, step->jt, step->jf, step->k);
    }
    va_end(arguments);
    return 0;
}

int main(int argc, char **argv)
{
    pye_status rc;

    if (argc == 3 && strcmp(argv[1], "closed") == 0) {
        rc = pye_sandbox_seccomp((uint32_t)strtoul(argv[2], NULL, 10));
    } else if (argc == 2 && strcmp(argv[1], "loading") == 0) {
        rc = pye_sandbox_seccomp_loading();
    } else {
        return 2;
    }
    return rc == PYE_OK ? 0 : 1;
}
