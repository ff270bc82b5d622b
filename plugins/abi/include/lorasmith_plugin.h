/* lorasmith plugin ABI 1.1
 *
 * An optimizer or a learning-rate schedule is a shared library that exports one function, lorasmith_plugin_entry.
 * A plugin never touches device memory: it composes operations of the host on opaque tensor handles, so that the
 * same binary runs on every device. plugins/ABI.md explains it in prose; plugins/sgd-c is a whole plugin in C.
 *
 * Rules that hold everywhere
 *   - Every struct begins with its own size in bytes. Structs only grow at the end. A minor version adds members,
 *     a major version may change anything.
 *   - A string is a pointer and a length in bytes: UTF-8, without a terminating zero.
 *   - Memory belongs to the side that made it. No side ever frees the memory of the other.
 *   - A pointer that is passed to a function is valid until that function returns, unless it says otherwise.
 *   - No exception, longjmp or panic may cross the boundary, in either direction.
 */
#ifndef LORASMITH_PLUGIN_H
#define LORASMITH_PLUGIN_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define LS_ABI_MAJOR 1u
#define LS_ABI_MINOR 1u

#if defined(_WIN32)
#define LS_EXPORT __declspec(dllexport)
#else
#define LS_EXPORT __attribute__((visibility("default")))
#endif

/* What a function answers. Anything but LS_OK is an error. */
typedef int32_t ls_status;
#define LS_OK 0            /* done */
#define LS_FAILED 1        /* the plugin gave up; it said why through `fail` */
#define LS_BAD_HANDLE 2    /* a tensor handle that is zero, released, or of another step */
#define LS_BAD_SHAPE 3     /* shapes that do not go together, a rank above 4, a zero or too large dimension */
#define LS_BAD_ARGUMENT 4  /* a null or misaligned pointer, an axis out of range, invalid UTF-8, an unknown number */
#define LS_DEVICE 5        /* the device could not do it */
#define LS_WRONG_THREAD 6  /* the host was called on another thread than `step` */
#define LS_PANIC 7         /* a bug: caught at the boundary */

/* A float32 tensor of rank 0 to 4 on the run's device. Zero is no tensor. A handle is a value: no operation changes
 * the tensor behind it. Handles die when `step` returns; the host then frees all of them. */
typedef uint64_t ls_tensor;

/* A borrowed UTF-8 string. `ptr` may be null when `len` is zero. */
typedef struct ls_str {
    const char *ptr;
    uint64_t len;
} ls_str;

/* Severities of `log`. */
#define LS_LOG_ERROR 1u
#define LS_LOG_WARN 2u
#define LS_LOG_INFO 3u
#define LS_LOG_DEBUG 4u

/* Parameter number that means the optimizer as a whole, where a state belongs to no single parameter. */
#define LS_GLOBAL UINT32_MAX
/* Axis that means all axes. */
#define LS_ALL_AXES INT32_MIN
/* The largest tensor that can be made, in elements. */
#define LS_MAX_ELEMENTS (UINT64_C(1) << 30)

/* Kinds of state tensors; a state is zero until it is first assigned. */
#define LS_STATE_LIKE_PARAM 0u /* the shape of its parameter */
#define LS_STATE_SHAPE 1u      /* a shape that the plugin gives */
#define LS_STATE_SCALAR 2u     /* rank 0 */
/* Since 1.1: the shape of the parameter, kept in 8 bits per element and a float32 per block of 256. `state` answers the
 * float32 values, `assign_state` rounds each to the nearest of 256 codes times the largest magnitude of its block:
 * the dynamic map of bitsandbytes. The signed map is for what may be negative. */
#define LS_STATE_BLOCKS8_SIGNED 3u
#define LS_STATE_BLOCKS8_UNSIGNED 4u
/* Integer counters have functions of their own: `counter`, `set_counter`. */

/* How a plugin reports outside of a step.
 *
 * Threads:   only the thread that runs the callback it was passed to.
 * Ownership: the host's; do not keep the pointer after the callback returns. */
typedef struct ls_report {
    uint32_t struct_size;
    uint32_t reserved;
    void *ctx; /* first argument of the functions below */
    /* Leaves a message for the user and answers LS_FAILED, so that `return report->fail(...)` works. The text is
     * copied. The first message is kept. */
    ls_status (*fail)(void *ctx, ls_str message);
    /* Writes a line to the service's log. The text is copied. */
    ls_status (*log)(void *ctx, uint32_t level, ls_str message);
} ls_report;

/* One trainable tensor in one step. */
typedef struct ls_param {
    uint32_t struct_size;
    uint32_t id;           /* the same parameter has the same number in every step of one process */
    ls_str name;           /* its key in the LoRA file; valid until `step` returns */
    ls_tensor value;       /* before the update; stays the old value after `assign` */
    ls_tensor grad;        /* clipped; the same shape. Zero in `eval` */
    double lr;             /* learning rate in this step, schedule included */
    uint32_t weight_decay; /* 1: weight decay applies; 0: it must not */
    uint32_t reserved;
} ls_param;

/* One optimizer step. */
typedef struct ls_step {
    uint32_t struct_size;
    uint32_t param_size;    /* distance in bytes between two entries of `params`: use it, a newer host may have larger ones */
    uint64_t step;          /* steps done before */
    uint64_t param_count;   /* parameters that have a gradient; the others are not listed */
    const ls_param *params; /* valid until `step` returns */
} ls_step;

/* The operations of the host.
 *
 * Threads:   callable only on the thread that called `step`, and only until `step` returns.
 * Ownership: the table is the host's. Tensors that an operation makes belong to the step and are freed at its end;
 *            `release` frees one earlier, which keeps the peak of device memory down.
 * Errors:    an operation that fails writes 0 to `out`, keeps its message with the host and makes the whole step fail,
 *            whatever `step` returns. All later operations of that step answer the same error at once, so a plugin
 *            may look at the status of its last call only. A failed step changes no parameter and no state.
 * Shapes:    tensors broadcast from the right, as in NumPy. Axes count from 0, negative ones from the end.
 * Speed:     operations are queued on the device. Only `read_scalar` and `read` wait for it. */
typedef struct ls_host {
    uint32_t struct_size;
    uint32_t reserved;
    void *ctx; /* first argument of every function below */

    /* out = a op b, element by element. */
    ls_status (*add)(void *ctx, ls_tensor a, ls_tensor b, ls_tensor *out);
    ls_status (*sub)(void *ctx, ls_tensor a, ls_tensor b, ls_tensor *out);
    ls_status (*mul)(void *ctx, ls_tensor a, ls_tensor b, ls_tensor *out);
    ls_status (*div)(void *ctx, ls_tensor a, ls_tensor b, ls_tensor *out);
    ls_status (*pow)(void *ctx, ls_tensor a, ls_tensor b, ls_tensor *out);
    ls_status (*min)(void *ctx, ls_tensor a, ls_tensor b, ls_tensor *out);
    ls_status (*max)(void *ctx, ls_tensor a, ls_tensor b, ls_tensor *out);
    /* 1 where a > b, else 0. */
    ls_status (*greater)(void *ctx, ls_tensor a, ls_tensor b, ls_tensor *out);

    /* The same with a number, which is rounded to float32. */
    ls_status (*add_scalar)(void *ctx, ls_tensor a, double s, ls_tensor *out);
    ls_status (*sub_scalar)(void *ctx, ls_tensor a, double s, ls_tensor *out);  /* a - s */
    ls_status (*rsub_scalar)(void *ctx, ls_tensor a, double s, ls_tensor *out); /* s - a */
    ls_status (*mul_scalar)(void *ctx, ls_tensor a, double s, ls_tensor *out);
    ls_status (*div_scalar)(void *ctx, ls_tensor a, double s, ls_tensor *out);  /* a / s */
    ls_status (*rdiv_scalar)(void *ctx, ls_tensor a, double s, ls_tensor *out); /* s / a */
    ls_status (*pow_scalar)(void *ctx, ls_tensor a, double s, ls_tensor *out);  /* a to the power s */
    ls_status (*greater_scalar)(void *ctx, ls_tensor a, double s, ls_tensor *out);

    /* out = f(a), element by element. */
    ls_status (*neg)(void *ctx, ls_tensor a, ls_tensor *out);
    ls_status (*abs)(void *ctx, ls_tensor a, ls_tensor *out);
    ls_status (*sign)(void *ctx, ls_tensor a, ls_tensor *out); /* -1, 0 or 1; 0 at 0 */
    ls_status (*sqrt)(void *ctx, ls_tensor a, ls_tensor *out);
    ls_status (*rsqrt)(void *ctx, ls_tensor a, ls_tensor *out); /* 1 / sqrt(a) */
    ls_status (*square)(void *ctx, ls_tensor a, ls_tensor *out);
    ls_status (*exp)(void *ctx, ls_tensor a, ls_tensor *out);
    ls_status (*log)(void *ctx, ls_tensor a, ls_tensor *out); /* natural logarithm */

    /* min(max(a, low), high); low must not be above high. */
    ls_status (*clamp)(void *ctx, ls_tensor a, double low, double high, ls_tensor *out);
    /* a where the condition is not 0, else b. */
    ls_status (*where)(void *ctx, ls_tensor condition, ls_tensor a, ls_tensor b, ls_tensor *out);
    /* a + t (b - a); as torch.lerp, b - (b - a)(1 - t) from t = 0.5 on. */
    ls_status (*lerp)(void *ctx, ls_tensor a, ls_tensor b, double t, ls_tensor *out);

    /* Matrix product over the last two axes; rank 2 to 4, leading axes broadcast. */
    ls_status (*matmul)(void *ctx, ls_tensor a, ls_tensor b, ls_tensor *out);
    /* Exchanges two axes. */
    ls_status (*transpose)(void *ctx, ls_tensor a, int32_t axis0, int32_t axis1, ls_tensor *out);
    /* The same elements in row-major order under another shape. `shape` has `rank` entries and may be null at rank 0. */
    ls_status (*reshape)(void *ctx, ls_tensor a, const uint64_t *shape, uint32_t rank, ls_tensor *out);

    /* Over one axis, which stays with length 1; or with LS_ALL_AXES over everything, to rank 0. */
    ls_status (*sum)(void *ctx, ls_tensor a, int32_t axis, ls_tensor *out);
    ls_status (*mean)(void *ctx, ls_tensor a, int32_t axis, ls_tensor *out);
    ls_status (*max_axis)(void *ctx, ls_tensor a, int32_t axis, ls_tensor *out);
    /* Sum of the products of two tensors of the same shape, rank 0. */
    ls_status (*dot)(void *ctx, ls_tensor a, ls_tensor b, ls_tensor *out);
    /* Euclidean norm of all elements, rank 0. */
    ls_status (*norm)(void *ctx, ls_tensor a, ls_tensor *out);

    /* Writes the dimensions to `dims`, which has room for 4, and their number to `rank`. Does not wait. */
    ls_status (*shape)(void *ctx, ls_tensor a, uint64_t *dims, uint32_t *rank);
    ls_status (*zeros)(void *ctx, const uint64_t *shape, uint32_t rank, ls_tensor *out);
    ls_status (*full)(void *ctx, const uint64_t *shape, uint32_t rank, double value, ls_tensor *out);
    /* Frees a tensor before the step ends; its handle is dead from then on. No effect on the handles in ls_param. */
    ls_status (*release)(void *ctx, ls_tensor a);

    /* Makes `a` the new value of a listed parameter; the same shape. Takes effect when `step` has returned LS_OK. */
    ls_status (*assign)(void *ctx, uint32_t param, ls_tensor a);
    /* The state called `name` of a parameter, or of LS_GLOBAL. Made of zeros at the first call. It must be asked for
     * with the same kind and shape every time. `shape` and `rank` count with LS_STATE_SHAPE only.
     * The host saves and restores states with the run: a plugin must keep nothing else from step to step. */
    ls_status (*state)(void *ctx, uint32_t param, ls_str name, uint32_t kind, const uint64_t *shape, uint32_t rank,
                       ls_tensor *out);
    /* Makes `a` the new content of a state that was asked for before; the same shape. `state` returns it from now on. */
    ls_status (*assign_state)(void *ctx, uint32_t param, ls_str name, ls_tensor a);
    /* A 64-bit counter, 0 at first; lives on the host's side, so reading it does not wait for the device. */
    ls_status (*counter)(void *ctx, uint32_t param, ls_str name, int64_t *out);
    ls_status (*set_counter)(void *ctx, uint32_t param, ls_str name, int64_t value);

    /* Waits for the device and reads a tensor of exactly one element. */
    ls_status (*read_scalar)(void *ctx, ls_tensor a, double *out);
    /* Waits for the device and copies a tensor, row-major, to `out`; `len` must be its number of elements. Slow. */
    ls_status (*read)(void *ctx, ls_tensor a, float *out, uint64_t len);
    /* A new tensor from `len` floats, which are copied; `len` must be the product of `shape`. Slow. */
    ls_status (*write)(void *ctx, const float *data, uint64_t len, const uint64_t *shape, uint32_t rank,
                       ls_tensor *out);

    /* As in ls_report. */
    ls_status (*fail)(void *ctx, ls_str message);
    ls_status (*log_message)(void *ctx, uint32_t level, ls_str message);
} ls_host;

/* The update of each element depends on that element alone: the host may run it over one concatenated tensor. */
#define LS_OPTIMIZER_ELEMENTWISE 1u

/* An optimizer. Static: it must stay valid and unchanged for the life of the process. */
typedef struct ls_optimizer {
    uint32_t struct_size;
    uint32_t flags; /* LS_OPTIMIZER_*; unknown bits are ignored */
    ls_str id;      /* 1 to 64 of a-z, 0-9, `_` and `-`; unique among all optimizers */
    ls_str summary; /* one sentence for a list */
    /* JSON Schema of the settings object, with defaults, ranges and "additionalProperties": false. The host checks
     * settings against it before `create`. */
    ls_str settings_schema;

    /* Makes an optimizer for one run. `settings_json` is a JSON object that passed the schema; missing members take
     * their defaults. On LS_OK `*self` is handed to the functions below. It must not be null: a plugin without settings
     * may hand out the address of a static.
     * Threads: any thread; several runs may be created at the same time. */
    ls_status (*create)(const ls_report *report, ls_str settings_json, void **self);
    /* One step over all parameters that have a gradient.
     * Threads: one call at a time for one `self`, but not always on the same thread. */
    ls_status (*step)(void *self, const ls_host *host, const ls_step *step);
    /* Frees `self`. Called once, on any thread; nothing is called with that `self` afterwards. */
    void (*destroy)(void *self);
    /* Since 1.1; null for most. The values to save, measure and draw pictures with, where those are not the values that
     * are trained on (schedule-free methods average). `assign` says them; what is not assigned stays. The host puts the
     * training values back afterwards, and keeps those in resume points. All parameters are listed, without gradients
     * and with a learning rate of 0. States and counters can be read but not changed.
     * Threads: as `step`. */
    ls_status (*eval)(void *self, const ls_host *host, const ls_step *step);
} ls_optimizer;

/* A learning-rate schedule. Static, as ls_optimizer. */
typedef struct ls_schedule {
    uint32_t struct_size;
    uint32_t reserved; /* 0 */
    ls_str id;
    ls_str summary;
    ls_str settings_schema;

    /* As for an optimizer. `total_steps` counts optimizer steps of the whole run. */
    ls_status (*create)(const ls_report *report, ls_str settings_json, double base_lr, uint64_t warmup_steps,
                        uint64_t total_steps, void **self);
    /* The factor on every learning rate after `step` optimizer steps; finite and not negative. A pure function of its
     * arguments, so that a resumed run gets the same numbers. May be called for any step, in any order.
     * Threads: one call at a time for one `self`. */
    ls_status (*factor)(void *self, const ls_report *report, uint64_t step, double *out);
    void (*destroy)(void *self);
} ls_schedule;

/* What a library offers. Static: valid and unchanged for the life of the process; libraries are never unloaded. */
typedef struct ls_plugin {
    uint32_t struct_size;
    uint32_t abi_major; /* LS_ABI_MAJOR of the header it was built with */
    uint32_t abi_minor; /* the minor version it needs; a host with a lower one refuses it */
    uint32_t reserved;  /* 0 */
    ls_str id;          /* as the id of an optimizer */
    ls_str version;
    ls_str license; /* SPDX expression */
    uint64_t optimizer_count;
    const ls_optimizer *const *optimizers; /* may be null when there are none */
    uint64_t schedule_count;
    const ls_schedule *const *schedules;
} ls_plugin;

/* The one exported symbol. Called once, on any thread, right after loading. Returns null when the plugin cannot work
 * with a host of that major version. */
LS_EXPORT const ls_plugin *lorasmith_plugin_entry(uint32_t host_abi_major);

#ifdef __cplusplus
}
#endif
#endif
