/* A libnvidia-ml.so.1 without hardware: what nvidia-ml-py asks is answered from a text file.
 *
 * The file is named by MLBOX_FAKE_NVML and read anew whenever it was replaced (write + rename), so a test changes the
 * "hardware" under a running process. One word and its values a line; N/A is written n/a, memory is in MiB:
 *
 *     driver 580.65.06
 *     init_error 9             nvmlInit fails with this nvmlReturn_t; so it does, with 9, while there is no file
 *     hang 3600                nvmlInit takes that many seconds
 *     gpu GPU-1d2c...          begins a GPU; the lines below are about the latest one
 *     name NVIDIA RTX A6000
 *     bus 00000000:17:00.0
 *     memory 49140 642         total, used; either may be n/a
 *     util 97                  %          n/a: not supported
 *     power 280000             mW         n/a
 *     temperature 61           degrees C  n/a
 *     mig 1
 *     mig_device MIG-1a.. 3 9728 12   a MIG device of it: UUID, GPU instance, total and used memory
 *     mig_lists 0              MIG devices do not list their processes, only their GPU does
 *     compute 4711 642         a process: pid, memory or n/a; `graphics` and `mps` likewise. On a GPU with MIG
 *     compute 4711 642 3       devices: of that GPU instance
 *     compute n/a              the list is not supported
 *     nvlink 1 4               4 links to GPU 1; `nvlink switch 18`: to an NVSwitch
 *     topology 1 20            nvmlGpuTopologyLevel_t to GPU 1
 *     cpus 0-3,8               the CPUs near it; without this line: not supported
 *     numa 1                   the NUMA node near it, likewise
 *     recovery 1               nvmlDeviceGpuRecoveryAction_t, likewise
 *     ecc 2                    uncorrected memory errors, likewise
 *     remap_failed 1           whether remapping a row failed, likewise
 *     xid 79 3                 an error reported when this line is there for the first time under a watched GPU, of a GPU
 *                              instance, or without that of the whole GPU. `xid n/a`: events are not supported
 *     error 15                 every question about it fails with this nvmlReturn_t
 *     lost                     as error 15, and its handle cannot be had either
 *     hang 3600                asking for its utilization takes that many seconds
 *
 * With -DOLD_DRIVER it lacks the functions that drivers before R510 lack. Layouts and codes are those of nvml.h.
 */
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define API __attribute__((visibility("default"))) int

enum { OK, UNINITIALIZED, INVALID, UNSUPPORTED, NOT_FOUND = 6, TOO_SMALL, NO_DRIVER = 9, TIMEOUT, LOST = 15 };
enum { MAX_GPUS = 16, MAX_PARTS = 8, MAX_PROCESSES = 64, MAX_LINKS = 18, MAX_XIDS = 32, SYSTEM = 50 };
enum { RECOVERY_FIELD = 230, XID_EVENT = 8 };
enum { COMPUTE, GRAPHICS, MPS, LISTS };
enum { SWITCH = -1 };

typedef unsigned int u32;
typedef unsigned long long u64;
static const u64 N_A = ~0ull;
static const char *const LIST_NAMES[LISTS] = {"compute", "graphics", "mps"};

typedef struct {
    u32 pid;
    u64 bytes;
    u32 gpu_instance, compute_instance;
} process_t;

typedef struct {
    char uuid[80], name[80], bus[32];
    u64 total, used;
    u64 util, power, temperature;
    int mig, error, lost, hang;
    int unlisted[LISTS], listed[LISTS];
    process_t processes[LISTS][MAX_PROCESSES];
    int links[MAX_LINKS], link_count;
    u32 levels[MAX_GPUS];
    struct {
        char uuid[80];
        u32 instance;
        u64 total, used;
    } parts[MAX_PARTS];
    int part_count, parts_unlisted;
    u64 cpus, numa, recovery, ecc, remap_failed;
} gpu_t;

static struct {
    char driver[80];
    int init_error, hang, count;
    gpu_t gpus[MAX_GPUS];
} box;
static int initialised;
/* What a caller holds as a device handle: the address of its slot; the first of a GPU's is for all of it. */
static char slots[MAX_GPUS][1 + MAX_PARTS];

/* ---- the file */

static u64 number(const char *text) {
    return strncmp(text, "n/a", 3) == 0 ? N_A : strtoull(text, NULL, 10);
}

static u64 mebibytes(const char *text) {
    u64 value = number(text);
    return value == N_A ? N_A : value << 20;
}

/* "0-3,8" as bits, of at most 64 CPUs */
static u64 cpu_bits(const char *text) {
    u64 bits = 0;
    int first, last, length;
    while (sscanf(text, "%d%n", &first, &length) == 1) {
        text += length, last = first;
        if (*text == '-' && sscanf(text + 1, "%d%n", &last, &length) == 1) text += 1 + length;
        for (; first <= last && first < 64; first++) bits |= 1ull << first;
        if (*text == ',') text++;
    }
    return bits;
}

static void gpu_begins(const char *uuid) {
    gpu_t *gpu = &box.gpus[box.count];
    if (box.count == MAX_GPUS) return;
    memset(gpu, 0, sizeof *gpu);
    snprintf(gpu->uuid, sizeof gpu->uuid, "%s", uuid);
    snprintf(gpu->name, sizeof gpu->name, "NVIDIA RTX A6000");
    snprintf(gpu->bus, sizeof gpu->bus, "00000000:%02X:00.0", 0x17 + box.count);
    gpu->total = 49140ull << 20;
    gpu->power = 25000;
    gpu->temperature = 35;
    gpu->numa = gpu->recovery = gpu->ecc = gpu->remap_failed = N_A;
    for (int i = 0; i < MAX_GPUS; i++) gpu->levels[i] = SYSTEM;
    box.count++;
}

static int process_read(gpu_t *gpu, const char *word, const char *value) {
    for (int list = 0; list < LISTS; list++) {
        char pid[32] = "", memory[32] = "";
        u32 instance = ~0u;
        int n = gpu->listed[list];
        if (strcmp(word, LIST_NAMES[list]) != 0) continue;
        if (sscanf(value, "%31s %31s %u", pid, memory, &instance) < 2)
            gpu->unlisted[list] = 1;
        else if (n < MAX_PROCESSES) {
            gpu->processes[list][n] = (process_t){(u32)number(pid), mebibytes(memory), instance, ~0u};
            gpu->listed[list]++;
        }
        return 1;
    }
    return 0;
}

static void part_read(gpu_t *gpu, const char *value) {
    int n = gpu->part_count;
    unsigned total = 0, used = 0;
    if (n == MAX_PARTS) return;
    sscanf(value, "%79s %u %u %u", gpu->parts[n].uuid, &gpu->parts[n].instance, &total, &used);
    gpu->parts[n].total = (u64)total << 20, gpu->parts[n].used = (u64)used << 20;
    gpu->part_count++;
}

static void gpu_line(gpu_t *gpu, const char *word, const char *value) {
    char first[32] = "", second[32] = "";
    sscanf(value, "%31s %31s", first, second);
    if (process_read(gpu, word, value)) return;
    if (strcmp(word, "name") == 0) snprintf(gpu->name, sizeof gpu->name, "%s", value);
    else if (strcmp(word, "bus") == 0) snprintf(gpu->bus, sizeof gpu->bus, "%s", first);
    else if (strcmp(word, "memory") == 0) gpu->total = mebibytes(first), gpu->used = mebibytes(second);
    else if (strcmp(word, "util") == 0) gpu->util = number(first);
    else if (strcmp(word, "power") == 0) gpu->power = number(first);
    else if (strcmp(word, "temperature") == 0) gpu->temperature = number(first);
    else if (strcmp(word, "mig") == 0) gpu->mig = atoi(first);
    else if (strcmp(word, "mig_device") == 0) part_read(gpu, value);
    else if (strcmp(word, "mig_lists") == 0) gpu->parts_unlisted = atoi(first) == 0;
    else if (strcmp(word, "cpus") == 0) gpu->cpus = cpu_bits(first);
    else if (strcmp(word, "numa") == 0) gpu->numa = number(first);
    else if (strcmp(word, "recovery") == 0) gpu->recovery = number(first);
    else if (strcmp(word, "ecc") == 0) gpu->ecc = number(first);
    else if (strcmp(word, "remap_failed") == 0) gpu->remap_failed = number(first);
    else if (strcmp(word, "error") == 0) gpu->error = atoi(first);
    else if (strcmp(word, "lost") == 0) gpu->lost = 1;
    else if (strcmp(word, "hang") == 0) gpu->hang = atoi(first);
    else if (strcmp(word, "topology") == 0 && atoi(first) < MAX_GPUS) gpu->levels[atoi(first)] = (u32)atoi(second);
    else if (strcmp(word, "nvlink") == 0)
        for (int n = atoi(second); n > 0 && gpu->link_count < MAX_LINKS; n--)
            gpu->links[gpu->link_count++] = strcmp(first, "switch") == 0 ? SWITCH : atoi(first);
}

static void line_read(const char *word, const char *value) {
    if (strcmp(word, "gpu") == 0) gpu_begins(value);
    else if (box.count > 0) gpu_line(&box.gpus[box.count - 1], word, value);
    else if (strcmp(word, "driver") == 0) snprintf(box.driver, sizeof box.driver, "%s", value);
    else if (strcmp(word, "init_error") == 0) box.init_error = atoi(value);
    else if (strcmp(word, "hang") == 0) box.hang = atoi(value);
}

/* Read the file if it was replaced since. Returns 0 when there is none. */
static int look(void) {
    static struct stat last;
    const char *path = getenv("MLBOX_FAKE_NVML");
    struct stat now;
    char line[256];
    FILE *file;

    if (path == NULL || stat(path, &now) != 0) return 0;
    if (now.st_ino == last.st_ino && now.st_size == last.st_size && now.st_mtim.tv_sec == last.st_mtim.tv_sec &&
        now.st_mtim.tv_nsec == last.st_mtim.tv_nsec)
        return 1;
    if ((file = fopen(path, "r")) == NULL) return 0;
    memset(&box, 0, sizeof box);
    snprintf(box.driver, sizeof box.driver, "580.65.06");
    while (fgets(line, sizeof line, file) != NULL) {
        char word[32] = "", *value;
        line[strcspn(line, "\n")] = '\0';
        if (sscanf(line, "%31s", word) != 1 || word[0] == '#') continue;
        value = strstr(line, word) + strlen(word);
        line_read(word, value + strspn(value, " "));
    }
    fclose(file);
    last = now;
    return 1;
}

/* The number of a MIG device on its GPU, -1 for a whole GPU. */
static int part_of(const void *handle) {
    return (int)(((const char *)handle - slots[0]) % (1 + MAX_PARTS)) - 1;
}

/* The GPU behind a handle, or NULL and why not. */
static gpu_t *gpu_of(const void *handle, int *error) {
    ptrdiff_t index = ((const char *)handle - slots[0]) / (1 + MAX_PARTS);
    look();
    *error = !initialised ? UNINITIALIZED : index < 0 || index >= box.count ? INVALID : OK;
    if (*error == OK) *error = box.gpus[index].lost ? LOST : box.gpus[index].error;
    if (*error == OK && part_of(handle) >= box.gpus[index].part_count) *error = INVALID;
    return *error == OK ? &box.gpus[index] : NULL;
}

#define GPU(handle)                            \
    int error_;                                \
    gpu_t *gpu = gpu_of((handle), &error_);    \
    if (gpu == NULL) return error_

static int give(u64 value, u32 *out) {
    if (value == N_A) return UNSUPPORTED;
    *out = (u32)value;
    return OK;
}

static int give_text(const char *text, char *out, u32 room) {
    return snprintf(out, room, "%s", text) < (int)room ? OK : TOO_SMALL;
}

/* ---- the library */

API nvmlInitWithFlags(u32 flags) {
    (void)flags;
    if (!look()) return NO_DRIVER;
    if (box.hang > 0) sleep((u32)box.hang);
    if (box.init_error != OK) return box.init_error;
    initialised++;
    return OK;
}

API nvmlShutdown(void) {
    if (!initialised) return UNINITIALIZED;
    initialised--;
    return OK;
}

__attribute__((visibility("default"))) const char *nvmlErrorString(int error) {
    return error == 999 ? "Unknown Error" : "NVML trouble";
}

API nvmlSystemGetDriverVersion(char *out, u32 room) {
    if (!initialised) return UNINITIALIZED;
    look();
    return give_text(box.driver, out, room);
}

API nvmlDeviceGetCount_v2(u32 *out) {
    if (!initialised) return UNINITIALIZED;
    look();
    return give((u64)box.count, out);
}

API nvmlDeviceGetHandleByIndex_v2(u32 index, void **out) {
    if (!initialised) return UNINITIALIZED;
    look();
    if (index >= (u32)box.count) return INVALID;
    if (box.gpus[index].lost) return LOST;
    *out = slots[index];
    return OK;
}

/* ---- one GPU */

API nvmlDeviceGetUUID(const void *handle, char *out, u32 room) {
    GPU(handle);
    return give_text(part_of(handle) < 0 ? gpu->uuid : gpu->parts[part_of(handle)].uuid, out, room);
}

API nvmlDeviceGetName(const void *handle, char *out, u32 room) {
    char name[128];
    GPU(handle);
    snprintf(name, sizeof name, "%s%s", gpu->name, part_of(handle) < 0 ? "" : " MIG 1g.10gb");
    return give_text(name, out, room);
}

API nvmlDeviceGetMinorNumber(const void *handle, u32 *out) {
    GPU(handle);
    return give((u64)(gpu - box.gpus), out);
}

typedef struct {
    char legacy[16];
    u32 domain, bus, device, id, subsystem;
    char text[32];
} pci_t;

static int give_pci(const char *bus, pci_t *out) {
    memset(out, 0, sizeof *out);
    return give_text(bus, out->text, sizeof out->text);
}

API nvmlDeviceGetPciInfo_v3(const void *handle, pci_t *out) {
    GPU(handle);
    return give_pci(gpu->bus, out);
}

API nvmlDeviceGetMemoryInfo(const void *handle, u64 out[3]) {
    GPU(handle);
    int part = part_of(handle);
    u64 total = part < 0 ? gpu->total : gpu->parts[part].total, used = part < 0 ? gpu->used : gpu->parts[part].used;
    if (total == N_A || used == N_A) return UNSUPPORTED;
    out[0] = total, out[1] = total - used, out[2] = used;
    return OK;
}

API nvmlDeviceGetUtilizationRates(const void *handle, u32 out[2]) {
    GPU(handle);
    if (gpu->hang > 0) sleep((u32)gpu->hang);
    out[1] = 0;
    return part_of(handle) < 0 ? give(gpu->util, &out[0]) : UNSUPPORTED;
}

API nvmlDeviceGetPowerUsage(const void *handle, u32 *out) {
    GPU(handle);
    return give(gpu->power, out);
}

API nvmlDeviceGetTemperature(const void *handle, u32 sensor, u32 *out) {
    GPU(handle);
    return sensor != 0 ? INVALID : give(gpu->temperature, out);
}

API nvmlDeviceGetMigMode(const void *handle, u32 *current, u32 *pending) {
    GPU(handle);
    if (part_of(handle) >= 0) return UNSUPPORTED;
    *pending = (u32)gpu->mig;
    return give((u64)gpu->mig, current);
}

API nvmlDeviceGetMaxMigDeviceCount(const void *handle, u32 *out) {
    GPU(handle);
    return give(gpu->mig ? MAX_PARTS : 0, out);
}

API nvmlDeviceGetMigDeviceHandleByIndex(const void *handle, u32 index, void **out) {
    GPU(handle);
    if (index >= MAX_PARTS) return INVALID;
    if (!gpu->mig || index >= (u32)gpu->part_count) return NOT_FOUND;
    *out = &slots[gpu - box.gpus][1 + index];
    return OK;
}

API nvmlDeviceGetGpuInstanceId(const void *handle, u32 *out) {
    GPU(handle);
    return part_of(handle) < 0 ? UNSUPPORTED : give(gpu->parts[part_of(handle)].instance, out);
}

API nvmlDeviceGetCpuAffinity(const void *handle, u32 words, u64 *out) {
    GPU(handle);
    if (gpu->cpus == 0) return UNSUPPORTED;
    memset(out, 0, words * sizeof *out);
    out[0] = gpu->cpus;
    return OK;
}

API nvmlDeviceGetMemoryAffinity(const void *handle, u32 words, u64 *out, u32 scope) {
    GPU(handle);
    if (gpu->numa == N_A || scope != 0) return UNSUPPORTED;
    memset(out, 0, words * sizeof *out);
    out[gpu->numa / 64] = 1ull << gpu->numa % 64;
    return OK;
}

/* ---- faults */

typedef struct {
    u32 field, scope;
    long long timestamp, latency;
    u32 type;
    int error;
    u64 value;
} field_t;

API nvmlDeviceGetFieldValues(const void *handle, int count, field_t *out) {
    GPU(handle);
    for (int i = 0; i < count; i++) {
        out[i].type = 1;
        out[i].error = out[i].field != RECOVERY_FIELD || gpu->recovery == N_A ? UNSUPPORTED : OK;
        out[i].value = gpu->recovery;
    }
    return OK;
}

API nvmlDeviceGetTotalEccErrors(const void *handle, u32 type, u32 counter, u64 *out) {
    GPU(handle);
    if (gpu->ecc == N_A) return UNSUPPORTED;
    if (type != 1 || counter != 0) return INVALID;
    *out = gpu->ecc;
    return OK;
}

API nvmlDeviceGetRemappedRows(const void *handle, u32 *corrected, u32 *uncorrected, u32 *pending, u32 *failed) {
    GPU(handle);
    *corrected = *uncorrected = *pending = 0;
    return give(gpu->remap_failed, failed);
}

typedef struct {
    void *device;
    u64 type, data;
    u32 gpu_instance, compute_instance;
} event_t;

/* One set is enough. A thread of its own waits for events, so they are read into a place of their own: of each GPU
 * whether it is watched, its XIDs, and how many of them were told. */
static struct {
    int watched[MAX_GPUS], told[MAX_GPUS], count[MAX_GPUS], unsupported[MAX_GPUS];
    struct {
        u64 xid;
        u32 instance;
    } xids[MAX_GPUS][MAX_XIDS];
} events;

static void events_look(void) {
    const char *path = getenv("MLBOX_FAKE_NVML");
    FILE *file = path == NULL ? NULL : fopen(path, "r");
    char line[256], word[32], value[32];
    int gpu = -1;
    if (file == NULL) return;
    memset(events.count, 0, sizeof events.count);
    while (fgets(line, sizeof line, file) != NULL) {
        u32 instance = ~0u;
        if (sscanf(line, "%31s %31s %u", word, value, &instance) < 2) continue;
        if (strcmp(word, "gpu") == 0) gpu++;
        if (gpu < 0 || gpu >= MAX_GPUS || strcmp(word, "xid") != 0) continue;
        if (number(value) == N_A) events.unsupported[gpu] = 1;
        else if (events.count[gpu] < MAX_XIDS) {
            events.xids[gpu][events.count[gpu]].xid = number(value);
            events.xids[gpu][events.count[gpu]++].instance = instance;
        }
    }
    fclose(file);
}

API nvmlEventSetCreate(void **out) {
    if (!initialised) return UNINITIALIZED;
    memset(&events, 0, sizeof events);
    events_look();
    *out = &events;
    return OK;
}

API nvmlEventSetFree(void *set) {
    return set == &events ? OK : INVALID;
}

API nvmlDeviceRegisterEvents(const void *handle, u64 types, const void *set) {
    GPU(handle);
    ptrdiff_t index = gpu - box.gpus;
    if (set != &events || part_of(handle) >= 0) return INVALID;
    if (events.unsupported[index] || types != XID_EVENT) return UNSUPPORTED;
    events.watched[index] = 1;
    events.told[index] = events.count[index];
    return OK;
}

API nvmlEventSetWait_v2(const void *set, event_t *out, u32 wait_ms) {
    if (!initialised) return UNINITIALIZED;
    if (set != &events) return INVALID;
    for (u32 waited_ms = 0;; waited_ms += 20, usleep(20000)) {
        events_look();
        for (int i = 0; i < MAX_GPUS; i++) {
            int next = events.told[i];
            if (!events.watched[i] || next >= events.count[i]) continue;
            *out = (event_t){slots[i], XID_EVENT, events.xids[i][next].xid, events.xids[i][next].instance, ~0u};
            events.told[i]++;
            return OK;
        }
        if (waited_ms >= wait_ms) return TIMEOUT;
    }
}

/* ---- its processes */

static int give_processes(const void *handle, int list, u32 *count, process_t *out) {
    GPU(handle);
    int part = part_of(handle);
    u32 room = *count;
    if (gpu->unlisted[list] || (part >= 0 && gpu->parts_unlisted)) return UNSUPPORTED;
    *count = 0;
    for (int n = 0; n < gpu->listed[list]; n++) {
        const process_t *process = &gpu->processes[list][n];
        if (part >= 0 && process->gpu_instance != gpu->parts[part].instance) continue;
        if (*count < room) out[*count] = *process;
        ++*count;
    }
    return *count > room ? TOO_SMALL : OK;
}

#define LISTINGS(version)                                                                                  \
    API nvmlDeviceGetComputeRunningProcesses##version(const void *handle, u32 *count, process_t *out) {    \
        return give_processes(handle, COMPUTE, count, out);                                                \
    }                                                                                                      \
    API nvmlDeviceGetGraphicsRunningProcesses##version(const void *handle, u32 *count, process_t *out) {   \
        return give_processes(handle, GRAPHICS, count, out);                                               \
    }                                                                                                      \
    API nvmlDeviceGetMPSComputeRunningProcesses##version(const void *handle, u32 *count, process_t *out) { \
        return give_processes(handle, MPS, count, out);                                                    \
    }
LISTINGS(_v2)

#ifndef OLD_DRIVER
LISTINGS(_v3)

typedef struct {
    u32 version;
    u64 total, reserved, free, used;
} memory_t;

API nvmlDeviceGetMemoryInfo_v2(const void *handle, memory_t *out) {
    u64 plain[3];
    int error = nvmlDeviceGetMemoryInfo(handle, plain);
    if (error != OK) return error;
    out->total = plain[0], out->reserved = 0, out->free = plain[1], out->used = plain[2];
    return OK;
}

typedef struct {
    u32 version, sensor;
    int celsius;
} temperature_t;

API nvmlDeviceGetTemperatureV(const void *handle, temperature_t *out) {
    return nvmlDeviceGetTemperature(handle, out->sensor, (u32 *)&out->celsius);
}
#endif

/* ---- between GPUs */

API nvmlDeviceGetTopologyCommonAncestor(const void *handle, const void *other, u32 *out) {
    int error;
    GPU(handle);
    if (gpu_of(other, &error) == NULL) return error;
    return give(gpu->levels[((const char *)other - slots[0]) / (1 + MAX_PARTS)], out);
}

API nvmlDeviceGetNvLinkState(const void *handle, u32 link, u32 *out) {
    GPU(handle);
    if (gpu->link_count == 0) return UNSUPPORTED;
    return link >= MAX_LINKS ? INVALID : give(link < (u32)gpu->link_count, out);
}

API nvmlDeviceGetNvLinkRemoteDeviceType(const void *handle, u32 link, u32 *out) {
    GPU(handle);
    if (link >= (u32)gpu->link_count) return INVALID;
    return give(gpu->links[link] == SWITCH ? 2 : 0, out);
}

API nvmlDeviceGetNvLinkRemotePciInfo_v2(const void *handle, u32 link, pci_t *out) {
    GPU(handle);
    if (link >= (u32)gpu->link_count || gpu->links[link] < 0 || gpu->links[link] >= box.count) return INVALID;
    return give_pci(box.gpus[gpu->links[link]].bus, out);
}
