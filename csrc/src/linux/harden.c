/* harden.c - single switches that make a process harder to read, trace or misuse. */
#define _GNU_SOURCE
#include "base/check.h"
#include "linux/sys.h"
#include "pyenclave/linux.h"

#if defined(__linux__)

#include <fcntl.h>
#include <linux/capability.h>
#include <linux/securebits.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#define PR_SET_MDWE_NUMBER 65
#define MDWE_REFUSE_EXEC_GAIN_BIT 1
#define PR_CAP_AMBIENT_NUMBER 47
#define PR_CAP_AMBIENT_CLEAR 4

pye_status pye_harden_dumpable_off(void)
{
    return pye_os_result(prctl(PR_SET_DUMPABLE, 0L, 0L, 0L, 0L));
}

pye_status pye_harden_limit(int resource, uint64_t value)
{
    const struct rlimit limit = {.rlim_cur = (rlim_t)value, .rlim_max = (rlim_t)value};

    /* glibc's enum for the first argument is an int in other C libraries. */
    return pye_os_result(syscall(SYS_prlimit64, 0, resource, &limit, NULL));
}

pye_status pye_harden_core_limit(void)
{
    return pye_harden_limit((int)RLIMIT_CORE, 0);
}

pye_status pye_harden_no_new_privs(void)
{
    return pye_os_result(prctl(PR_SET_NO_NEW_PRIVS, 1L, 0L, 0L, 0L));
}

pye_status pye_harden_parent_death(int signal, int parent_pidfd)
{
    struct pollfd parent = {.fd = parent_pidfd, .events = POLLIN};
    int ready = 0;

    PYE_REFUSE_IF(signal < 0 || signal > 64, PYE_E_ARGUMENT);
    PYE_REFUSE_IF(prctl(PR_SET_PDEATHSIG, (long)signal, 0L, 0L, 0L) != 0, pye_os_status(errno));
    /* The parent may have ended before the line above. In a new pid namespace getppid() is 0
     * whatever happened, so only a descriptor can tell. */
    if (parent_pidfd >= 0) {
        do { /* a signal that waits ends even a poll that does not wait */
            ready = poll(&parent, 1, 0);
        } while (ready < 0 && errno == EINTR);
    }
    PYE_REFUSE_IF(ready != 0, PYE_E_PEER_LOST);
    return PYE_OK;
}

pye_status pye_harden_mdwe(void)
{
    if (prctl(PR_SET_MDWE_NUMBER, (long)MDWE_REFUSE_EXEC_GAIN_BIT, 0L, 0L, 0L) == 0) {
        return PYE_OK;
    }
    /* A kernel that does not know the option says EINVAL. */
    return errno == EINVAL ? PYE_E_UNSUPPORTED : pye_os_status(errno);
}

pye_status pye_harden_signals(void)
{
    struct sigaction action;
    sigset_t none;

    memset(&action, 0, sizeof(action));
    for (int number = 1; number <= SIGRTMAX; number++) {
        const int ignored = number == SIGPIPE || number == SIGXFSZ || number == SIGINT;

        action.sa_handler = ignored ? SIG_IGN : SIG_DFL;
        /* SIGKILL, SIGSTOP and the C library's own refuse: they are as they should be. */
        (void)sigaction(number, &action, NULL);
    }
    (void)sigemptyset(&none);
    return pye_os_result(sigprocmask(SIG_SETMASK, &none, NULL));
}

pye_status pye_harden_capabilities(void)
{
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3, .pid = 0};
    struct __user_cap_data_struct data[2];
    const long locked = SECBIT_NOROOT | SECBIT_NOROOT_LOCKED | SECBIT_NO_SETUID_FIXUP_LOCKED |
                        SECBIT_KEEP_CAPS_LOCKED | SECBIT_NO_CAP_AMBIENT_RAISE |
                        SECBIT_NO_CAP_AMBIENT_RAISE_LOCKED;
    int may_set;

    memset(data, 0, sizeof(data));
    PYE_REFUSE_IF(syscall(SYS_capget, &header, data) != 0, pye_os_status(errno));
    may_set = (data[0].effective & (1u << CAP_SETPCAP)) != 0;
    if (may_set) {
        /* Capabilities that this kernel does not have end the loop with EINVAL. */
        for (long cap = 0; cap < 64; cap++) {
            if (prctl(PR_CAPBSET_DROP, cap, 0L, 0L, 0L) != 0) {
                PYE_REFUSE_IF(errno != EINVAL, pye_os_status(errno));
                break;
            }
        }
        PYE_REFUSE_IF(prctl(PR_SET_SECUREBITS, locked, 0L, 0L, 0L) != 0, pye_os_status(errno));
    }
    /* Needs no capability; EINVAL before Linux 4.3, which has no ambient set. */
    (void)prctl(PR_CAP_AMBIENT_NUMBER, (long)PR_CAP_AMBIENT_CLEAR, 0L, 0L, 0L);
    memset(data, 0, sizeof(data));
    PYE_REFUSE_IF(syscall(SYS_capset, &header, data) != 0 ||
                      syscall(SYS_capget, &header, data) != 0,
                  pye_os_status(errno));
    for (int i = 0; i < 2; i++) {
        if (PYE_GUARD((data[i].effective | data[i].permitted | data[i].inheritable) != 0)) {
            errno = EPERM;
            return PYE_E_DENIED;
        }
    }
    return PYE_OK;
}

pye_status pye_harden_tracer(int64_t *out_pid)
{
    static const char label[] = "\nTracerPid:";
    char text[4096];
    const char *at;
    ssize_t len;
    const int fd = open("/proc/self/status", O_RDONLY | O_CLOEXEC);

    *out_pid = 0;
    PYE_REFUSE_IF(fd < 0, errno == ENOENT ? PYE_E_UNSUPPORTED : pye_os_status(errno));
    len = read(fd, text, sizeof(text) - 1);
    (void)close(fd);
    PYE_REFUSE_IF(len <= 0, PYE_E_OS);
    text[len] = '\0';
    at = strstr(text, label);
    PYE_REFUSE_IF(at == NULL, PYE_E_UNSUPPORTED);
    *out_pid = (int64_t)strtol(at + sizeof(label) - 1, NULL, 10);
    return PYE_OK;
}

pye_status pye_harden_threads(uint32_t *out_count)
{
    struct stat tasks;

    *out_count = 0;
    /* The folder has one subfolder a thread, and its link count says how many. */
    PYE_REFUSE_IF(stat("/proc/self/task", &tasks) != 0 || tasks.st_nlink < 3, PYE_E_UNSUPPORTED);
    *out_count = (uint32_t)tasks.st_nlink - 2;
    return PYE_OK;
}

#endif
