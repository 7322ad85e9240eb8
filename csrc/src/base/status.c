/* status.c - the one table of status names and messages. */
#include "pyenclave/base.h"

typedef struct {
    pye_status status;
    const char *name;
    const char *message;
} status_row;

#define ROW(status, message) {status, #status, message}

static const status_row rows[] = {
    ROW(PYE_OK, "success"),
    ROW(PYE_E_ARGUMENT, "an argument is outside its range"),
    ROW(PYE_E_LENGTH, "a length is not the one required"),
    ROW(PYE_E_ALIGNMENT, "an address is not aligned as required"),
    ROW(PYE_E_OVERLAP, "input and output overlap partly"),
    ROW(PYE_E_STATE, "the object is not in a state that allows this"),
    ROW(PYE_E_CLOSED, "the object is closed"),
    ROW(PYE_E_FORKED, "the object belongs to the process that made it, not to a forked child"),
    ROW(PYE_E_BUSY, "the object is in use"),
    ROW(PYE_E_POISONED, "the object was destroyed after a protocol or integrity failure"),
    ROW(PYE_E_PEER_LOST, "the process at the other end has ended"),
    ROW(PYE_E_TIMEOUT, "the deadline passed"),
    ROW(PYE_E_PROTOCOL, "the other end broke the protocol"),
    ROW(PYE_E_AUTH, "authentication failed: the data, its header or its version was changed"),
    ROW(PYE_E_LIMIT, "a limit of this key or object is reached"),
    ROW(PYE_E_NO_MEMORY, "no memory"),
    ROW(PYE_E_OS, "a system call failed"),
    ROW(PYE_E_RANDOM, "the system gave no random bytes"),
    ROW(PYE_E_DENIED, "the system refused permission"),
    ROW(PYE_E_UNSUPPORTED, "this CPU, kernel or build does not support it"),
    ROW(PYE_E_SELF_TEST, "a known-answer test failed: the implementation is not used"),
};

static const status_row *find(pye_status status)
{
    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        if (rows[i].status == status) {
            return &rows[i];
        }
    }
    return NULL;
}

const char *pye_status_name(pye_status status)
{
    const status_row *row = find(status);
    return row != NULL ? row->name : "PYE_E_UNKNOWN";
}

const char *pye_status_message(pye_status status)
{
    const status_row *row = find(status);
    return row != NULL ? row->message : "unknown status";
}
