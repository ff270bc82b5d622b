/* SGD with momentum 0.9, as torch.optim.SGD: buffer = 0.9 buffer + grad; value -= lr buffer.
 *
 * A whole lorasmith plugin in plain C. It has no settings, so every run shares one static object; what must survive
 * a step is a state on the host. See plugins/ABI.md.
 */
#include "lorasmith_plugin.h"

#define TEXT(literal) {literal, sizeof(literal) - 1}

static const ls_str BUFFER = TEXT("momentum_buffer");
static char nothing; /* stands for the optimizer: it keeps nothing between steps */

static ls_status create(const ls_report *report, ls_str settings_json, void **self) {
    (void)report;
    (void)settings_json; /* passed the schema, so it is {} */
    *self = &nothing;
    return LS_OK;
}

static ls_status update(const ls_host *h, const ls_param *p) {
    ls_tensor old, kept, buffer, change, value;
    /* The first operation that fails makes all later ones answer the same error: the last status is enough. */
    h->state(h->ctx, p->id, BUFFER, LS_STATE_LIKE_PARAM, 0, 0, &old);
    h->mul_scalar(h->ctx, old, 0.9, &kept);
    h->add(h->ctx, kept, p->grad, &buffer);
    h->mul_scalar(h->ctx, buffer, p->lr, &change);
    h->sub(h->ctx, p->value, change, &value);
    h->assign(h->ctx, p->id, value);
    h->assign_state(h->ctx, p->id, BUFFER, buffer);
    /* What was assigned stays alive. The rest would be freed at the end of the step; freeing it here saves memory. */
    h->release(h->ctx, old);
    h->release(h->ctx, kept);
    h->release(h->ctx, change);
    h->release(h->ctx, value);
    return h->release(h->ctx, buffer);
}

static ls_status step(void *self, const ls_host *host, const ls_step *now) {
    (void)self;
    if (host->struct_size < sizeof *host || now->struct_size < sizeof *now) return LS_BAD_ARGUMENT;
    for (uint64_t i = 0; i < now->param_count; i++) {
        /* Entries lie param_size bytes apart: a newer host may have longer ones. */
        const char *entry = (const char *)now->params + i * now->param_size;
        ls_status status = update(host, (const ls_param *)(const void *)entry);
        if (status != LS_OK) return status;
    }
    return LS_OK;
}

static void destroy(void *self) { (void)self; }

static const ls_optimizer SGD = {
    sizeof(ls_optimizer), LS_OPTIMIZER_ELEMENTWISE, TEXT("sgd-momentum"), TEXT("SGD with momentum 0.9, in C."),
    TEXT("{\"type\": \"object\", \"properties\": {}, \"additionalProperties\": false, "
         "\"x-state-bytes-per-element\": 4}"), create, step, destroy,
    0, /* no eval: what is trained on is saved */
};
static const ls_optimizer *const OPTIMIZERS[] = {&SGD};
static const ls_plugin PLUGIN = {
    sizeof(ls_plugin), LS_ABI_MAJOR, LS_ABI_MINOR, 0, TEXT("sgd-c"), TEXT("1.0.0"), TEXT("MIT OR Apache-2.0"),
    1, OPTIMIZERS, 0, 0,
};

const ls_plugin *lorasmith_plugin_entry(uint32_t host_abi_major) {
    return host_abi_major == LS_ABI_MAJOR ? &PLUGIN : 0;
}
