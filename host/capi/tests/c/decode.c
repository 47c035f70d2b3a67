/* Decodes a few tokens through the C interface, on the processor: an owned cache, and the same steps over memory of this
 * program's own, which must give the same bits. Prints what was selected, and ends with 0 if all is well. */

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tokenselect.h"

enum { HQ = 4, HKV = 2, D = 16, PAGE_SIZE = 4, NUM_PAGES = 16, MAX_BLOCK = 8 };

static void check(ts_status status, const char *call) {
    if (status == TS_STATUS_OK) return;
    fprintf(stderr, "%s: %s: %s\n", call, ts_status_name(status), ts_last_error_message());
    exit(1);
}
#define CHECK(call) check((call), #call)

static void expect(int truth, const char *text) {
    if (truth) return;
    fprintf(stderr, "not so: %s\n", text);
    exit(1);
}
#define EXPECT(truth) expect((truth), #truth)

/* Numbers between -1 and 1 that look random. */
static void fill(float *to, size_t len, uint32_t seed) {
    for (size_t i = 0; i < len; i++) {
        seed = seed * 1664525u + 1013904223u;
        to[i] = (float)(seed >> 8) / 8388608.0f - 1.0f;
    }
}

int main(void) {
    EXPECT(ts_abi_version() == TS_ABI_VERSION);
    printf("tokenselect %s\n", ts_version());

    ts_device *device;
    CHECK(ts_device_cpu(&device));
    printf("device %s\n", ts_device_name(device));

    ts_config config;
    CHECK(ts_config_default(&config, sizeof config));
    config.num_qo_heads = HQ, config.num_kv_heads = HKV, config.head_dim = D;
    config.dtype = TS_DTYPE_F32;
    config.n_init = 2, config.n_local = 3, config.top_k = 5;
    config.positions = TS_POSITIONS_REASSIGNED;
    config.rope.theta = 500000.0;

    ts_limits limits;
    CHECK(ts_limits_default(&limits, sizeof limits));
    limits.max_block_len = MAX_BLOCK, limits.max_kv_tokens = NUM_PAGES * PAGE_SIZE;

    size_t bytes;
    CHECK(ts_workspace_bytes(device, &config, &limits, &bytes));
    EXPECT(bytes > NUM_PAGES * PAGE_SIZE * HQ * sizeof(float));

    ts_context *context;
    CHECK(ts_context_create(device, &config, &limits, &context));

    ts_cache_config size;
    CHECK(ts_cache_config_default(&size, sizeof size));
    size.num_pages = NUM_PAGES, size.page_size = PAGE_SIZE;
    ts_cache *cache;
    CHECK(ts_cache_create(device, &config, &size, &cache));
    ts_sequence sequence;
    CHECK(ts_cache_sequence_create(cache, &sequence));

    /* The same in memory of our own: [num_pages, 2, page_size, HKV, D]. */
    static float pool[NUM_PAGES * 2 * PAGE_SIZE * HKV * D];
    ts_kv_view kv = {.struct_size = sizeof kv};
    kv.num_pages = NUM_PAGES, kv.page_size = PAGE_SIZE, kv.num_kv_heads = HKV, kv.head_dim = D;
    kv.k = pool, kv.v = pool + PAGE_SIZE * HKV * D;
    CHECK(ts_kv_view_set_dense(&kv, TS_KV_LAYOUT_NHD));
    kv.k_stride_page *= 2, kv.v_stride_page *= 2;
    ts_selection_cache *selections;
    CHECK(ts_selection_cache_create(device, &config, 1, 1, &selections));

    const size_t blocks[] = {8, 8, 1, 1, 1, 1};
    size_t len = 0;
    for (size_t step = 0; step < sizeof blocks / sizeof blocks[0]; step++) {
        const size_t tokens = blocks[step];
        float q[MAX_BLOCK * HQ * D], k[MAX_BLOCK * HKV * D], v[MAX_BLOCK * HKV * D];
        fill(q, tokens * HQ * D, 1);
        fill(k, tokens * HKV * D, 2 + 3 * (uint32_t)step);
        fill(v, tokens * HKV * D, 3 + 3 * (uint32_t)step);

        float out[MAX_BLOCK * HQ * D], lse[MAX_BLOCK * HQ];
        ts_output output = {.struct_size = sizeof output};
        output.out = out, output.lse = lse, output.out_dtype = TS_DTYPE_F32;
        ts_batch *batch;
        CHECK(ts_cache_extend(cache, &sequence, &tokens, 1, &batch));
        ts_step_input input = {.struct_size = sizeof input, .q = q, .k = k, .v = v};
        CHECK(ts_step(context, cache, 0, batch, &input, &output));
        CHECK(ts_batch_destroy(batch));
        len += tokens;

        size_t selected;
        uint32_t list[64];
        CHECK(ts_context_selected(context, 0, list, 64, &selected));
        printf("%zu tokens, %zu selected:", len, selected);
        for (size_t i = 0; i < selected; i++) printf(" %u", list[i]);
        printf("\n");
        EXPECT(selected == (len < 11 ? len : len - tokens - 3 - 2 <= 5 ? len : 2 + 5 + 3 + tokens));

        const int32_t pages = (int32_t)((len + PAGE_SIZE - 1) / PAGE_SIZE);
        int32_t qo_indptr[2] = {0, (int32_t)tokens}, indptr[2] = {0, pages}, indices[NUM_PAGES];
        for (int32_t page = 0; page < pages; page++) indices[page] = NUM_PAGES - 1 - page;
        int32_t last_page_len = (int32_t)len - (pages - 1) * PAGE_SIZE, sequence_index = 0;
        ts_batch_tables tables = {.struct_size = sizeof tables};
        tables.page_size = PAGE_SIZE, tables.num_rows = 1;
        tables.qo_indptr = qo_indptr, tables.indptr = indptr, tables.indices = indices;
        tables.last_page_len = &last_page_len, tables.sequence_indices = &sequence_index;
        CHECK(ts_batch_create(&tables, &batch));
        /* The same in the output of a fused projection, [tokens, HQ + 2 HKV, D]. */
        enum { ROW = (HQ + 2 * HKV) * D };
        static float qkv[MAX_BLOCK * ROW];
        for (size_t t = 0; t < tokens; t++) {
            memcpy(qkv + t * ROW, q + t * HQ * D, HQ * D * sizeof(float));
            memcpy(qkv + t * ROW + HQ * D, k + t * HKV * D, HKV * D * sizeof(float));
            memcpy(qkv + t * ROW + (HQ + HKV) * D, v + t * HKV * D, HKV * D * sizeof(float));
        }
        ts_step_input fused = {.struct_size = sizeof fused};
        fused.q = qkv, fused.k = qkv + HQ * D, fused.v = qkv + (HQ + HKV) * D;
        fused.q_stride_token = fused.k_stride_token = fused.v_stride_token = ROW;
        CHECK(ts_append(context, batch, &kv, &fused));
        CHECK(ts_select(context, batch, &kv, &fused, selections, 0));
        float own_out[MAX_BLOCK * HQ * D], own_lse[MAX_BLOCK * HQ];
        output.out = own_out, output.lse = own_lse;
        CHECK(ts_attend(context, batch, &kv, &fused, &output));
        CHECK(ts_batch_destroy(batch));
        EXPECT(memcmp(out, own_out, tokens * HQ * D * sizeof(float)) == 0);
        EXPECT(memcmp(lse, own_lse, tokens * HQ * sizeof(float)) == 0);
        for (size_t i = 0; i < tokens * HQ; i++) EXPECT(isfinite(lse[i]));
    }

    ts_selection_stats stats, own;
    CHECK(ts_cache_stats(cache, &stats));
    CHECK(ts_selection_cache_stats(selections, &own));
    EXPECT(stats.reused == own.reused && stats.scored == own.scored && stats.complete == own.complete);
    printf("reused %llu, scored %llu, complete %llu\n", (unsigned long long)stats.reused,
           (unsigned long long)stats.scored, (unsigned long long)stats.complete);

    ts_batch *none;
    const size_t many = 1000;
    EXPECT(ts_cache_extend(cache, &sequence, &many, 1, &none) == TS_STATUS_OUT_OF_PAGES);
    EXPECT(none == NULL);
    printf("error: %s\n", ts_last_error_message());

    CHECK(ts_selection_cache_destroy(selections));
    CHECK(ts_cache_destroy(cache));
    CHECK(ts_context_destroy(context));
    CHECK(ts_device_destroy(device));
    printf("done\n");
    return 0;
}
