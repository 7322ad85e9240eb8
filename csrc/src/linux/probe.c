/* probe.c - closing the sandbox in two steps, and trying from inside whether it is closed.
 *
 * A bit is set only by a try that was refused. Where the same try can succeed before closing it is
 * made then too, so that a refusal for another reason does not count. What the namespaces, Landlock
 * and capabilities refuse is tried before seccomp, which would refuse all of it at the door. */
#define _GNU_SOURCE
#include "base/check.h"
#include "linux/sys.h"
#include "pyenclave/linux.h"

#if defined(__linux__)

#include <arpa/inet.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <netinet/in.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "linux/namespaces.h"

static void prove(pye_sandbox *sandbox, uint32_t bit, int holds)
{
    sandbox->proved = holds ? sandbox->proved | bit : sandbox->proved & ~bit;
}

/* 0 or the errno of opening the root folder for reading. */
static int try_open(void)
{
    const int fd = open("/", O_RDONLY | O_DIRECTORY | O_CLOEXEC);

    if (fd < 0) {
        return errno;
    }
    (void)close(fd);
    return 0;
}

/* 0 or the errno of making a fresh page executable after it was writable. */
static int try_exec_memory(void)
{
    const size_t page = (size_t)sysconf(_SC_PAGESIZE);
    void *memory =
        mmap(NULL, page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    int error = 0;

    if (memory == MAP_FAILED) {
        return 0; /* proves nothing */
    }
    if (mprotect(memory, page, PROT_READ | PROT_EXEC) != 0) {
        error = errno;
    }
    (void)munmap(memory, page);
    return error;
}

/* 0 or the errno of pointing a datagram socket at `address`. Nothing is sent. */
static int try_route(const char *address)
{
    struct sockaddr_in to;
    int error = 0;
    const int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);

    if (fd < 0) {
        return errno;
    }
    memset(&to, 0, sizeof(to));
    to.sin_family = AF_INET;
    to.sin_port = htons(9);
    if (inet_pton(AF_INET, address, &to.sin_addr) != 1 ||
        connect(fd, (struct sockaddr *)&to, sizeof(to)) != 0) {
        error = errno;
    }
    (void)close(fd);
    return error;
}

static int other_namespace(const pye_sandbox *sandbox, size_t index)
{
    const uint64_t mine = pye_namespace_id(index);

    return sandbox->outer_ns[index] != 0 && mine != 0 && mine != sandbox->outer_ns[index];
}

static void prove_namespaces(pye_sandbox *sandbox)
{
    const pid_t outer = (pid_t)sandbox->outer_pid;
    /* In a new network namespace even the loopback interface is down; elsewhere it is up. */
    const int no_network =
        try_route("127.0.0.1") == ENETUNREACH && try_route("192.0.2.1") == ENETUNREACH;
    /* The maker lives, but its number names nobody here. Number 1 would name this process. */
    const int no_maker = outer > 1 && getpid() == 1 && kill(outer, 0) != 0 && errno == ESRCH;

    prove(sandbox, PYE_BIT_USERNS, other_namespace(sandbox, 0));
    prove(sandbox, PYE_BIT_NETNS, other_namespace(sandbox, 1) && no_network);
    prove(sandbox, PYE_BIT_PIDNS, other_namespace(sandbox, 2) && no_maker);
    prove(sandbox, PYE_BIT_MOUNTNS, other_namespace(sandbox, 3));
    prove(sandbox, PYE_BIT_IPCNS, other_namespace(sandbox, 4));
    prove(sandbox, PYE_BIT_UTSNS, other_namespace(sandbox, 5));
    prove(sandbox, PYE_BIT_CGROUPNS, other_namespace(sandbox, 6));
}

/* Makes a page of secret memory and tries to read it as another process would. */
static void prove_secret_memory(pye_sandbox *sandbox)
{
    uint8_t byte = 0;
    size_t got = 0;
    void *memory = NULL;
    int refused;

    if (pye_secmem_new(&memory, 1, &sandbox->secret_kind) != PYE_OK) {
        return;
    }
    *(volatile uint8_t *)memory = 0x5a;
    refused = pye_process_read(getpid(), (uintptr_t)memory, &byte, 1, &got) == PYE_E_OS &&
              errno == EFAULT;
    /* The same try on ordinary memory must succeed, else it shows nothing. */
    refused = refused && pye_process_read(getpid(), (uintptr_t)&byte, &byte, 1, &got) == PYE_OK;
    prove(sandbox, PYE_BIT_SECRETMEM, sandbox->secret_kind == PYE_SECMEM_SECRET && refused);
    prove(sandbox, PYE_BIT_LOCKED,
          sandbox->secret_kind == PYE_SECMEM_SECRET || sandbox->secret_kind == PYE_SECMEM_LOCKED);
    pye_secmem_free(memory, 1);
}

static int no_capabilities(void)
{
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3, .pid = 0};
    struct __user_cap_data_struct data[2];

    memset(data, 0xff, sizeof(data));
    return syscall(SYS_capget, &header, data) == 0 &&
           (data[0].effective | data[0].permitted | data[1].effective | data[1].permitted) == 0;
}

static void prove_switches(pye_sandbox *sandbox)
{
    struct rlimit core = {.rlim_cur = 1, .rlim_max = 1};
    const int dumpable_off = prctl(PR_GET_DUMPABLE, 0L, 0L, 0L, 0L) == 0;
    const int no_core = getrlimit(RLIMIT_CORE, &core) == 0 && core.rlim_max == 0;

    prove(sandbox, PYE_BIT_DUMPABLE_OFF, dumpable_off);
    prove(sandbox, PYE_BIT_NODUMP, dumpable_off && no_core);
    prove(sandbox, PYE_BIT_NO_NEW_PRIVS, prctl(PR_GET_NO_NEW_PRIVS, 0L, 0L, 0L, 0L) == 1);
}

pye_status pye_sandbox_before(pye_sandbox *sandbox)
{
    pye_status rc;
    uint32_t threads;
    int64_t tracer;
    int baseline;

    sandbox->landlock_abi = sandbox->secret_kind = sandbox->proved = 0;
    PYE_REFUSE_IF(sandbox->step != 0, PYE_E_STATE);
    PYE_TRY(pye_harden_threads(&threads));
    /* the others would stay outside Landlock */
    PYE_REFUSE_IF(threads != 1, PYE_E_STATE);
    PYE_TRY(pye_harden_no_new_privs());
    prove(sandbox, PYE_BIT_UNTRACED, pye_harden_tracer(&tracer) == PYE_OK && tracer == 0);
    prove(sandbox, PYE_BIT_NO_CAPABILITIES, no_capabilities());
    prove_namespaces(sandbox);
    prove_secret_memory(sandbox);
    prove_switches(sandbox);
    baseline = try_open();
    if (pye_sandbox_landlock(&sandbox->landlock_abi) == PYE_OK) {
        prove(sandbox, PYE_BIT_LANDLOCK, baseline == 0 && try_open() == EACCES);
    }
    rc = pye_sandbox_seccomp_loading();
    PYE_REFUSE_IF(rc != PYE_OK && rc != PYE_E_UNSUPPORTED && rc != PYE_E_DENIED && rc != PYE_E_OS,
                  rc);
    sandbox->step = 1;
    return PYE_OK;
}

/* Calls that fail in another way, or not at all, without the filter. */
static int seccomp_refuses(void)
{
    const int pid_group = syscall(SYS_getpgid, 0) == -1 && errno == EPERM;
    const int unshares = syscall(SYS_unshare, 0) == -1 && errno == EPERM;
    const int executes = syscall(SYS_execve, NULL, NULL, NULL) == -1 && errno == EPERM;

    return pid_group && unshares && executes;
}

pye_status pye_sandbox_after(pye_sandbox *sandbox, uint32_t flags)
{
    const int jit = (flags & PYE_SECCOMP_JIT) != 0;
    pye_status rc;

    PYE_REFUSE_IF(sandbox->step != 1, PYE_E_STATE);
    PYE_REFUSE_IF((flags & ~(uint32_t)(PYE_SECCOMP_JIT | PYE_SECCOMP_SEALED)) != 0,
                  PYE_E_ARGUMENT);
    if (!jit) {
        const int baseline = try_exec_memory();

        if (pye_harden_mdwe() == PYE_OK) {
            prove(sandbox, PYE_BIT_MDWE, baseline == 0 && try_exec_memory() == EACCES);
        }
    }
    rc = pye_sandbox_seccomp(flags);
    PYE_REFUSE_IF(rc != PYE_OK && rc != PYE_E_UNSUPPORTED && rc != PYE_E_DENIED && rc != PYE_E_OS,
                  rc);
    prove(sandbox, PYE_BIT_SECCOMP, rc == PYE_OK && seccomp_refuses());
    sandbox->step = 2;
    return PYE_OK;
}

pye_status pye_sandbox_probe(pye_sandbox *sandbox, uint32_t *out_bits)
{
    uint32_t had;

    *out_bits = 0;
    PYE_REFUSE_IF(sandbox->step != 2, PYE_E_STATE);
    had = sandbox->proved;
    prove_switches(sandbox);
    prove(sandbox, PYE_BIT_SECCOMP, seccomp_refuses());
    if (try_open() == 0) {
        prove(sandbox, PYE_BIT_LANDLOCK, 0);
    }
    if (try_exec_memory() == 0) {
        prove(sandbox, PYE_BIT_MDWE, 0);
    }
    if (try_route("127.0.0.1") == 0) {
        prove(sandbox, PYE_BIT_NETNS, 0);
    }
    /* What was lost once stays lost: the process was open meanwhile. */
    sandbox->proved &= had;
    *out_bits = sandbox->proved;
    return PYE_OK;
}

#endif

const char *pye_bit_name(uint32_t bit)
{
    switch (bit) {
    case PYE_BIT_DUMPABLE_OFF:
        return "dumpable_off";
    case PYE_BIT_UNTRACED:
        return "untraced";
    case PYE_BIT_USERNS:
        return "userns";
    case PYE_BIT_NETNS:
        return "netns";
    case PYE_BIT_PIDNS:
        return "pidns";
    case PYE_BIT_LANDLOCK:
        return "landlock";
    case PYE_BIT_SECCOMP:
        return "seccomp";
    case PYE_BIT_MDWE:
        return "mdwe";
    case PYE_BIT_SECRETMEM:
        return "secretmem";
    case PYE_BIT_LOCKED:
        return "locked";
    case PYE_BIT_NODUMP:
        return "nodump";
    case PYE_BIT_NO_NEW_PRIVS:
        return "no_new_privs";
    case PYE_BIT_NO_CAPABILITIES:
        return "no_capabilities";
    case PYE_BIT_MOUNTNS:
        return "mountns";
    case PYE_BIT_IPCNS:
        return "ipcns";
    case PYE_BIT_UTSNS:
        return "utsns";
    case PYE_BIT_CGROUPNS:
        return "cgroupns";
    default:
        return NULL;
    }
}
