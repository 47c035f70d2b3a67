/* tokenselect: token-level KV-cache selection and sparse attention for long-context LLM inference.
 *
 * Made by cbindgen from host/capi/src: do not edit. The guide is host/capi/README.md.
 *
 * - A function answers a ts_status, 0 for success; the text of the last error is kept per thread, ts_last_error_message.
 * - Objects are opaque handles, made by a _create function and given back by _destroy, in any order.
 * - Pointers to tensors are addresses of the device, of the host for the processor. Types and shapes follow from
 *   configuration and batch. The cache and a step's queries, keys and values may be strided; other tensors are dense. A null
 *   pointer is an error unless the text allows it.
 * - Work on a GPU is put in the device's stream; only functions that say so wait for it.
 * - A handle is used by one thread at a time, except where it says otherwise.
 * - Structures that callers fill begin with their size, struct_size. A shorter one than this version's is an older one, and
 *   what it lacks is 0; of a longer one, what this version does not know must be 0. Else: TS_STATUS_STRUCT_SIZE.
 */

#ifndef TOKENSELECT_H
#define TOKENSELECT_H

#include <stddef.h>
#include <stdint.h>

/// Version of the interface. Raised when a function or structure changes in a way that old programs do not survive.
#define TS_ABI_VERSION 2

/// Version of the library that this header is of, `0.1.0` being 0, 1 and 0: for `#if`.
#define TS_VERSION_MAJOR 0

/// See `TS_VERSION_MAJOR`.
#define TS_VERSION_MINOR 1

/// See `TS_VERSION_MAJOR`.
#define TS_VERSION_PATCH 0

/// What a function answers. 0 is success; anything else comes with a text, `ts_last_error_message`.
///
/// A call that fails has changed nothing, except for `TS_STATUS_PANIC`, and for `ts_prefill` and `ts_prefill_kv` where the
/// device fails behind their first piece.
enum ts_status
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  /// Done, or (on a GPU) put into the stream.
  TS_STATUS_OK = 0,
  /// A pointer is null that must not be.
  TS_STATUS_NULL_POINTER = 1,
  /// A pointer is not aligned as its contents or the device need it.
  TS_STATUS_MISALIGNED = 2,
  /// A number is none of its enumeration's.
  TS_STATUS_UNKNOWN_ENUM = 3,
  /// A structure has a size that this version of the library does not know.
  TS_STATUS_STRUCT_SIZE = 4,
  /// A buffer that is written overlaps another argument.
  TS_STATUS_OVERLAP = 5,
  /// A buffer of the caller's is too short for the answer.
  TS_STATUS_CAPACITY = 6,
  /// The caller's function in `ts_capture` answered something else than 0.
  TS_STATUS_CALLBACK = 7,
  /// A defect of this library. Destroy the handles that took part; nothing else may be done with them.
  TS_STATUS_PANIC = 8,
  /// A field of a configuration, or another argument, breaks its rule.
  TS_STATUS_CONFIG = 16,
  /// A tensor has the wrong shape.
  TS_STATUS_SHAPE = 17,
  /// A tensor has the wrong number of elements, or strides lead beyond its memory.
  TS_STATUS_LENGTH = 18,
  /// A tensor has the wrong element type.
  TS_STATUS_ELEMENT_TYPE = 19,
  /// An index is not below its limit.
  TS_STATUS_INDEX = 20,
  /// A batch is larger than the limits of the context: its sequences may be truncated to what they were and extended by less.
  TS_STATUS_LIMIT = 21,
  /// Page tables or lengths of a batch contradict each other.
  TS_STATUS_TABLE = 22,
  /// Not enough free pages.
  TS_STATUS_OUT_OF_PAGES = 23,
  /// No sequence can be added.
  TS_STATUS_TOO_MANY_SEQUENCES = 24,
  /// The sequence was never created by this cache, or was freed.
  TS_STATUS_UNKNOWN_SEQUENCE = 25,
  /// A sequence appears twice in one batch.
  TS_STATUS_DUPLICATE_SEQUENCE = 26,
  /// A sequence would grow beyond the largest length.
  TS_STATUS_SEQUENCE_TOO_LONG = 27,
  /// A sequence can be truncated only to a length it has reached.
  TS_STATUS_TRUNCATE_BEYOND_END = 28,
  /// The batch was made before the cache changed under it.
  TS_STATUS_STALE_BATCH = 29,
  /// Memory or a batch belongs to another device.
  TS_STATUS_WRONG_DEVICE = 30,
  /// The device, or this build of the library, cannot do that.
  TS_STATUS_UNSUPPORTED = 31,
  /// A driver call failed. It may stem from earlier asynchronous work.
  TS_STATUS_DRIVER = 32,
  /// A kernel could not be launched, or (in the emulator) broke a rule.
  TS_STATUS_LAUNCH = 33,
  /// Something is needed that the configuration turned off, or that was not given.
  TS_STATUS_MISSING = 34,
  /// An error that this version of the interface has no code for; its text says what it is.
  TS_STATUS_OTHER = 35,
  /// An operation came before another one whose results it works on, or after that was done for another batch.
  TS_STATUS_ORDER = 36,
  /// A layer lacks tokens that a step is to build on: it was left out of an earlier step, or that failed.
  TS_STATUS_UNWRITTEN = 37,
  /// Memory cannot be had.
  TS_STATUS_OUT_OF_MEMORY = 38,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum ts_status ts_status;
#else
typedef int32_t ts_status;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/// Element types.
enum ts_dtype
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  /// IEEE 754 half precision.
  TS_DTYPE_F16 = 0,
  /// bfloat16.
  TS_DTYPE_BF16 = 1,
  /// IEEE 754 single precision.
  TS_DTYPE_F32 = 2,
  /// Unsigned 32-bit integer.
  TS_DTYPE_U32 = 3,
  /// Unsigned 64-bit integer.
  TS_DTYPE_U64 = 4,
  /// IEEE 754 double precision.
  TS_DTYPE_F64 = 5,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum ts_dtype ts_dtype;
#else
typedef int32_t ts_dtype;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/// Order of the dimensions of a page.
enum ts_kv_layout
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  /// `[num_pages, page_size, num_kv_heads, head_dim]`.
  TS_KV_LAYOUT_NHD = 0,
  /// `[num_pages, num_kv_heads, page_size, head_dim]`.
  TS_KV_LAYOUT_HND = 1,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum ts_kv_layout ts_kv_layout;
#else
typedef int32_t ts_kv_layout;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/// The operations that a context is made for, to be added up. A GPU has more kernels for some than for others: it
/// scores and attends for some head dimensions, and votes for any. `ts_merge` is always there.
enum ts_operation
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  /// `ts_append`, `ts_cache_append`.
  TS_OPERATION_APPEND = 1,
  /// `ts_pool`.
  TS_OPERATION_POOL = 2,
  /// `ts_score`.
  TS_OPERATION_SCORE = 4,
  /// `ts_vote`, `ts_top_k`, `ts_vote_top_k`.
  TS_OPERATION_VOTE = 8,
  /// `ts_attend`, `ts_attend_dense`, `ts_attend_to`.
  TS_OPERATION_ATTEND = 16,
  /// All but attention, for engines that attend with kernels of their own: `ts_select` and `ts_append_select`, too.
  TS_OPERATION_SELECTION = 15,
  /// All of them.
  TS_OPERATION_ALL = 31,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum ts_operation ts_operation;
#else
typedef int32_t ts_operation;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/// Where tokens stand when they are compared.
enum ts_positions
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  /// Keys enter the cache already rotated by the model.
  TS_POSITIONS_NATIVE = 0,
  /// Keys enter the cache before RoPE and are rotated at their rank in the selected list.
  TS_POSITIONS_REASSIGNED = 1,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum ts_positions ts_positions;
#else
typedef int32_t ts_positions;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/// Which elements of a head form a rotated pair.
enum ts_rope_pairing
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  /// `i` with `i + rotary_dim / 2`: Llama and Qwen in the Hugging Face layout.
  TS_ROPE_PAIRING_HALF_SPLIT = 0,
  /// `2 i` with `2 i + 1`: GPT-J, GLM.
  TS_ROPE_PAIRING_INTERLEAVED = 1,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum ts_rope_pairing ts_rope_pairing;
#else
typedef int32_t ts_rope_pairing;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/// How frequencies are stretched for contexts beyond the training length.
enum ts_rope_scaling
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  /// Frequencies as trained.
  TS_ROPE_SCALING_NONE = 0,
  /// Every frequency divided by `factor`.
  TS_ROPE_SCALING_LINEAR = 1,
  /// Llama 3.1: uses `factor`, `low_freq_factor`, `high_freq_factor`, `original_max_position`.
  TS_ROPE_SCALING_LLAMA3 = 2,
  /// YaRN: uses `factor`, `original_max_position`, `beta_fast`, `beta_slow`, `attention_factor`.
  TS_ROPE_SCALING_YARN = 3,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum ts_rope_scaling ts_rope_scaling;
#else
typedef int32_t ts_rope_scaling;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/// What a step does for a row, as `TS_WORKSPACE_ACTIONS` holds it.
enum ts_row_action
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  /// Nothing: the row has no queries, or no tokens.
  TS_ROW_ACTION_SKIP = 0,
  /// There are at most `top_k` candidates: every token is selected.
  TS_ROW_ACTION_COMPLETE = 1,
  /// Score, vote and select.
  TS_ROW_ACTION_SCORE = 2,
  /// Use the cached selection again.
  TS_ROW_ACTION_REUSE = 3,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum ts_row_action ts_row_action;
#else
typedef int32_t ts_row_action;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/// Buffers between the operations of a step. Rows are rows of the batch; token `j` of a row is at
/// `ts_batch_row.token_base + j`. Entries that the current batch does not use are undefined.
enum ts_workspace
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  /// `[max_rows, num_qo_heads, head_dim]` f32, written by pool: the scoring queries.
  TS_WORKSPACE_QUERIES = 0,
  /// `[max_rows]` f32, written by pool and decide: cosine with the cached scoring query; -1 where there is none.
  TS_WORKSPACE_SIMILARITIES = 1,
  /// `[max_rows]` u32, written by pool and decide: a `ts_row_action`.
  TS_WORKSPACE_ACTIONS = 2,
  /// `[places, num_qo_heads]` f32, written by score for candidates: scaled dot products. `places` is somewhat more
  /// than `max_kv_tokens`, and the order is the device's own, which `ts_context_logit_index` tells. On the processor
  /// `[token_base + token, num_qo_heads]`; on GPUs tiles of `[num_kv_heads, 16 tokens, num_qo_heads / num_kv_heads]`,
  /// each row from a tile of its own on.
  TS_WORKSPACE_LOGITS = 3,
  /// `[max_rows, num_qo_heads, 2]` f32, written by score: the largest logit, and the sum of `exp(logit - largest)`.
  TS_WORKSPACE_STATS = 4,
  /// `[max_kv_tokens]` f32, written by vote for candidates: softmax probabilities summed over heads.
  TS_WORKSPACE_VOTES = 5,
  /// `[max_kv_tokens]` f32, written by top-k where `vote_pool_window` is above 1 (else `[0]`): max-pooled votes.
  TS_WORKSPACE_POOLED_VOTES = 6,
  /// `[max_rows, top_k]` u32, written by top-k: chosen tokens, ascending.
  TS_WORKSPACE_TOP_K = 7,
  /// `[max_rows, width]` u32, written by top-k: selected tokens, ascending.
  TS_WORKSPACE_SELECTED = 8,
  /// `[max_rows]` u32, written by top-k: length of each selected list.
  TS_WORKSPACE_SELECTED_LEN = 9,
  /// `[max_rows, 3]` f64, written by compare: scoring query times cached one, scoring query squared, cached one squared,
  /// each over all heads of this context; zeros where no cached selection is usable.
  TS_WORKSPACE_PRODUCTS = 10,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum ts_workspace ts_workspace;
#else
typedef int32_t ts_workspace;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/// One step's rows: which queries belong to which sequence, and in which pages its tokens lie. Never changes.
///
/// May be used by several threads at once, by contexts of one device. The first operation on a GPU copies the tables
/// there.
typedef struct ts_batch ts_batch;

/// A fixed place in a GPU's memory for the tables of one batch after another, so that captured work reads lengths and
/// pages of the batch that was put there last. One thread at a time.
typedef struct ts_batch_slot ts_batch_slot;

/// Memory of a device that the library owns: for programs without an allocator of their own.
typedef struct ts_buffer ts_buffer;

/// An owned paged cache: memory, page tables and Selection Cache. One thread at a time.
typedef struct ts_cache ts_cache;

/// Runs steps and operations: configuration, limits and workspace. One context serves all layers and sequences of a
/// model in turn; one thread at a time.
typedef struct ts_context ts_context;

/// A place where operations run and memory lies, with one order of work: a stream.
///
/// Handles made on a device hold it: destroying a device before them is allowed. A device may be used by several
/// threads at once.
typedef struct ts_device ts_device;

/// Work recorded by `ts_capture`: a CUDA graph. One thread at a time.
typedef struct ts_graph ts_graph;

/// A batch of prompts, of any number of tokens each, as pieces that one step of a context has room for. Made once for all
/// layers. Prompts are read one after the other: pieces are parts of the query tokens, in their order.
///
/// Never changes. Tables of the first pieces, up to 64 MiB, are kept here and on the device; those of others are made
/// whenever a layer comes to them.
typedef struct ts_pieces ts_pieces;

/// Cached selections of every layer and sequence, for an engine with a cache of its own, which calls
/// `ts_selection_cache_clear`, `_fork` and `_truncate` whenever it does the same to a sequence; or those of a
/// `ts_cache`. One thread at a time.
typedef struct ts_selection_cache ts_selection_cache;

/// Rotary embedding of the position mode `TS_POSITIONS_REASSIGNED`; not looked at otherwise.
typedef struct ts_rope {
  /// Base of the frequencies, above 1. Default 10000.
  double theta;
  /// Leading elements of a head that are rotated, even; 0 for all. Default 0.
  uint32_t rotary_dim;
  /// A `ts_rope_pairing`. Default `TS_ROPE_PAIRING_HALF_SPLIT`.
  int32_t pairing;
  /// A `ts_rope_scaling`, which says what fields below are used. Default `TS_ROPE_SCALING_NONE`.
  int32_t scaling;
  /// 0.
  uint32_t reserved;
  /// Stretch, above 0. Default 1.
  double factor;
  /// Default 1.
  double low_freq_factor;
  /// Default 4.
  double high_freq_factor;
  /// Training context in tokens. Default 8192.
  double original_max_position;
  /// Default 32.
  double beta_fast;
  /// Default 1.
  double beta_slow;
  /// Factor on rotated queries and keys; NaN for `0.1 ln(factor) + 1`. Default NaN.
  double attention_factor;
} ts_rope;

/// Everything that decides what is selected and attended to. Filled by `ts_config_default`.
typedef struct ts_config {
  /// `sizeof(ts_config)`.
  size_t struct_size;
  /// Query (and output) heads, a multiple of `num_kv_heads`. Default 32.
  uint32_t num_qo_heads;
  /// Key/value heads. Default 8.
  uint32_t num_kv_heads;
  /// Elements of a head, a multiple of 8, at most 256. Default 128.
  uint32_t head_dim;
  /// Type of queries, keys and values, a `ts_dtype`: f16, bf16 or f32 (on a GPU f16 or bf16). Default
  /// `TS_DTYPE_BF16`.
  int32_t dtype;
  /// The first `n_init` tokens of a sequence are always selected. Default 128.
  size_t n_init;
  /// The last `n_local` tokens before the current block are always selected. Default 512.
  size_t n_local;
  /// Tokens chosen by vote among the rest, at least 1. Default 2048.
  size_t top_k;
  /// Odd width of the max-pool over votes before the top-k; 1 for none. Default 1.
  size_t vote_pool_window;
  /// Factor on the scoring dot products; NaN for `1 / sqrt(head_dim)`. Default NaN.
  float score_scale;
  /// Factor on the attention logits; NaN for `1 / sqrt(head_dim)`. Default NaN.
  float sm_scale;
  /// `c` of the soft cap `c * tanh(logit / c)` in attention; 0 for none. Default 0.
  float logits_soft_cap;
  /// Position mode, a `ts_positions`. Default `TS_POSITIONS_NATIVE`.
  int32_t positions;
  /// Rotary embedding for reassigned positions.
  struct ts_rope rope;
  /// Whether selections may be used again between steps: 0 or 1. Default 1.
  int32_t selection_cache;
  /// Smallest cosine of scoring queries for which a selection is used again, from -1 to 1. Default 0.9.
  float similarity_threshold;
  /// How often one selection may be used again; `UINT32_MAX` for `max(n_local, 1)`. Default `UINT32_MAX`.
  uint32_t max_reuse;
  /// 0.
  uint32_t reserved;
} ts_config;

/// What a context is made for: the largest batch that it will be given, and operations. Filled by `ts_limits_default`.
typedef struct ts_limits {
  /// `sizeof(ts_limits)`.
  size_t struct_size;
  /// Rows of a batch. Default 1.
  size_t max_rows;
  /// Query tokens of one row. Default 512.
  size_t max_block_len;
  /// Tokens cached by all rows of a batch together, every row rounded up to whole pages. Default 131072.
  size_t max_kv_tokens;
  /// A sum of `ts_operation`; 0 for all of them. What is left out answers `TS_STATUS_MISSING`. Default
  /// `TS_OPERATION_ALL`.
  int32_t operations;
  /// 0.
  int32_t reserved;
} ts_limits;

/// Size and layout of an owned cache. Filled by `ts_cache_config_default`.
typedef struct ts_cache_config {
  /// `sizeof(ts_cache_config)`.
  size_t struct_size;
  /// Layers of the model, each with keys and values of its own. Default 1.
  size_t num_layers;
  /// Pages of every layer. Default 1024.
  size_t num_pages;
  /// Tokens in a page, 1 to 256. Default 16.
  size_t page_size;
  /// Sequences that may be alive at once. Default 16.
  size_t max_sequences;
  /// Order of the dimensions of a page, a `ts_kv_layout`. Default `TS_KV_LAYOUT_NHD`.
  int32_t layout;
  /// 0.
  int32_t reserved;
} ts_cache_config;

/// Address, type and shape of a dense tensor of the library's.
typedef struct ts_tensor {
  /// First element: an address of the device, of the host for the processor. Null or any address for an empty tensor.
  void *data;
  /// A `ts_dtype`.
  int32_t dtype;
  /// Dimensions used of `shape`.
  uint32_t rank;
  /// Outermost first; 1 beyond the rank.
  size_t shape[4];
} ts_tensor;

/// Paged keys and values of one layer. Their type is the configuration's; they lie on the context's device.
///
/// The element `i` of head `h` of token `t` of page `p` of the keys is at `p * k_stride_page + t * k_stride_token + h *
/// k_stride_head + i`, and of the values likewise. The two may lie among each other in either order, as in `[num_pages,
/// 2, page_size, num_kv_heads, head_dim]` or `[num_pages, num_kv_heads, page_size, 2 * head_dim]`, as long as no
/// element is in both. Unused places are never read into a result. Fields that are not set are 0.
typedef struct ts_kv_view {
  /// `sizeof(ts_kv_view)`.
  size_t struct_size;
  /// First key. Aligned to 16 bytes on a GPU.
  void *k;
  /// First value. As `k`.
  void *v;
  /// Pages in the pool.
  size_t num_pages;
  /// Tokens in a page.
  size_t page_size;
  /// KV heads of a token.
  size_t num_kv_heads;
  /// Elements of a head, which are adjacent.
  size_t head_dim;
  /// Elements from a page to the next, in the keys. On a GPU strides are multiples of 8.
  size_t k_stride_page;
  /// Elements from a token to the next of its page, in the keys.
  size_t k_stride_token;
  /// Elements from a head to the next of its token, in the keys.
  size_t k_stride_head;
  /// As `k_stride_page`, in the values.
  size_t v_stride_page;
  /// As `k_stride_token`, in the values.
  size_t v_stride_token;
  /// As `k_stride_head`, in the values.
  size_t v_stride_head;
} ts_kv_view;

/// Page tables, in the host's memory, copied by `ts_batch_create`. They describe the cache *after* the block was
/// appended: a row has `n = (pages - 1) * page_size + last_page_len` tokens, the last of which are its block. Fields
/// that are not set are 0.
typedef struct ts_batch_tables {
  /// `sizeof(ts_batch_tables)`.
  size_t struct_size;
  /// Tokens in a page, 1 to 256.
  size_t page_size;
  /// Rows of the batch.
  size_t num_rows;
  /// `[num_rows + 1]`, ascending from 0: the query tokens of row `r` are rows `qo_indptr[r]` to `qo_indptr[r + 1]` of
  /// `q`, `k`, `v` and `out`. A row of 0 query tokens is padding.
  const int32_t *qo_indptr;
  /// `[num_rows + 1]`, ascending from 0: the pages of row `r` are `indices[indptr[r]]` to `indices[indptr[r + 1]]`.
  const int32_t *indptr;
  /// `[indptr[num_rows]]`: page numbers, in token order.
  const int32_t *indices;
  /// `[num_rows]`: tokens in each row's last page, 1 to `page_size`; 0 for a row without pages.
  const int32_t *last_page_len;
  /// `[num_rows]`, or null: the row of the Selection Cache that belongs to each row, all different. Operations
  /// that are given a Selection Cache need it.
  const int32_t *sequence_indices;
  /// `[num_rows, 2]`, or null: for parts of sequences (sequence parallelism), begin and end of the tokens that
  /// compete for the top-k. What the row holds beside them is always selected; such rows never reuse a selection.
  const int32_t *candidates;
} ts_batch_tables;

/// Sizes of a batch.
typedef struct ts_batch_info {
  /// Rows.
  size_t num_rows;
  /// Query tokens of all rows: the leading dimension of `q`, `k`, `v` and `out`.
  size_t num_query_tokens;
  /// Tokens in a page.
  size_t page_size;
  /// The longest block.
  size_t max_block_len;
  /// The most tokens cached by one row.
  size_t max_kv_len;
  /// Places for tokens in logits and votes: all pages of all rows. What `ts_limits.max_kv_tokens` limits.
  size_t num_token_places;
} ts_batch_info;

/// Sizes and places of a row.
typedef struct ts_batch_row {
  /// First query token.
  size_t query_begin;
  /// Query tokens of the row.
  size_t block_len;
  /// Tokens cached, the block included.
  size_t kv_len;
  /// Where the row begins in logits and votes: its token `j` is at `token_base + j`.
  size_t token_base;
} ts_batch_row;

/// Page tables of another engine in memory of the device: vLLM's block tables, SGLang's slots of tokens. Fields that
/// are not set are 0.
///
/// All entries are 32-bit integers; a negative one is beyond every limit. They are read when the device comes to it,
/// and the host never looks at them: a row that breaks a rule is left without tokens, and `ts_batch_slot_faults` counts
/// it. Two rows whose blocks lie in one page, or that name one sequence, are not found: what is written there is then
/// one's or the other's.
typedef struct ts_device_tables {
  /// `sizeof(ts_device_tables)`.
  size_t struct_size;
  /// Rows of `entries`.
  size_t num_table_rows;
  /// Entries of each row of `entries`.
  size_t num_entries;
  /// `[num_table_rows, num_entries]`: pages in token order, or the slot of each token.
  const int32_t *entries;
  /// Whether the entries are slots of tokens (a token's page times the page size and its place in the page): 0 or 1.
  int32_t entries_are_slots;
  /// 0.
  int32_t reserved;
  /// `[num_rows]`, or null: the row of `entries` of each row of the batch. Null: the row with the same number.
  const int32_t *rows;
  /// `[num_rows]`: tokens of each row, its block included; at least its block, or 0.
  const int32_t *kv_lens;
  /// `[num_rows]`, or null: the row of the Selection Cache of each row, all different, -1 for none. Given exactly if
  /// the slot's batches have sequence indices.
  const int32_t *sequence_indices;
  /// Pages of the pool, at least 1. A page number beyond it is a fault, and becomes the last page.
  size_t num_pages;
  /// Sequences of the Selection Cache. A sequence beyond it is a fault, and becomes none.
  size_t num_sequences;
} ts_device_tables;

/// Queries, keys and values of a step of one layer, of the configuration's type. An operation reads those that it needs;
/// the others may be null.
///
/// The element `i` of head `h` of token `t` of the queries is at `t * q_stride_token + h * q_stride_head + i`, and of keys
/// and values likewise. Strides that are 0 are those of dense tensors, others may be those of slices of a fused projection,
/// `[num_query_tokens, num_qo_heads + 2 * num_kv_heads, head_dim]`: all `_stride_token` are then the elements of its row.
/// On a GPU strides are multiples of 8. Fields that are not set are 0.
typedef struct ts_step_input {
  /// `sizeof(ts_step_input)`.
  size_t struct_size;
  /// `[num_query_tokens, num_qo_heads, head_dim]`: queries of all rows. Aligned to 16 bytes on a GPU.
  const void *q;
  /// `[num_query_tokens, num_kv_heads, head_dim]`: keys to append, rotated by the model for native positions, not rotated
  /// for reassigned ones. As `q`.
  const void *k;
  /// As `k`: values to append.
  const void *v;
  /// Elements from a token to the next, in the queries; 0 for `num_qo_heads * head_dim`.
  size_t q_stride_token;
  /// Elements from a head to the next of its token, in the queries; 0 for `head_dim`.
  size_t q_stride_head;
  /// As `q_stride_token`, in the keys; 0 for `num_kv_heads * head_dim`.
  size_t k_stride_token;
  /// As `q_stride_head`, in the keys.
  size_t k_stride_head;
  /// As `k_stride_token`, in the values.
  size_t v_stride_token;
  /// As `q_stride_head`, in the values.
  size_t v_stride_head;
} ts_step_input;

/// Outputs of attention, dense. Fields that are not set are 0.
typedef struct ts_output {
  /// `sizeof(ts_output)`.
  size_t struct_size;
  /// `[num_query_tokens, num_qo_heads, head_dim]` of `out_dtype`, written.
  void *out;
  /// `[num_query_tokens, num_qo_heads]` f32, written: natural log of the sum of exponentials. May be null.
  float *lse;
  /// A `ts_dtype`: the configuration's or f32.
  int32_t out_dtype;
  /// 0.
  int32_t reserved;
} ts_output;

/// Lists of tokens to attend to, one a row, in memory of the device. Fields that are not set are 0.
typedef struct ts_selection {
  /// `sizeof(ts_selection)`.
  size_t struct_size;
  /// Rows of the arrays, at least the batch's.
  size_t num_rows;
  /// Places for tokens in a row.
  size_t width;
  /// `[num_rows, width]`: tokens of each row, ascending.
  const uint32_t *tokens;
  /// `[num_rows]`: length of each list.
  const uint32_t *len;
  /// `[num_rows, width]`, or null: rank of each token in the whole list, where these lists are parts of longer ones.
  const uint32_t *ranks;
  /// `[num_rows]`, null exactly if `ranks` is: length of each whole list.
  const uint32_t *total_len;
} ts_selection;

/// Attention outputs over disjoint parts of a list, dense. Fields that are not set are 0.
typedef struct ts_parts {
  /// `sizeof(ts_parts)`.
  size_t struct_size;
  /// Parts, at least 1.
  size_t num_parts;
  /// Query tokens.
  size_t num_query_tokens;
  /// `[num_parts, num_query_tokens, num_qo_heads, head_dim]` f32.
  const float *parts;
  /// `[num_parts, num_query_tokens, num_qo_heads]` f32. A part with `-inf` does not count.
  const float *part_lses;
} ts_parts;

/// What was done for the rows of past steps.
typedef struct ts_selection_stats {
  /// Rows that used a cached selection again.
  uint64_t reused;
  /// Rows that were scored and selected anew.
  uint64_t scored;
  /// Rows so short that every token was selected without scoring.
  uint64_t complete;
} ts_selection_stats;

/// Names a sequence of one cache. A name is never used twice.
typedef uint64_t ts_sequence;

/// How prompts are read, and the memory for it. Filled by `ts_prefill_config_default`.
typedef struct ts_prefill_config {
  /// `sizeof(ts_prefill_config)`.
  size_t struct_size;
  /// Tokens of a block. A dial, from about 4 to 512: short blocks are nearer to dense attention and cost more passes over
  /// the keys; long blocks pool many queries into one and are fastest. Default 512, the paper's.
  size_t block_len;
  /// The most tokens that a sequence has when its prompt has been read. Default 131072.
  size_t max_kv_len;
  /// The most tokens of a piece, which is the work of one step and of one call of a `ts_progress`; where it is less
  /// than a block, a piece is one block. Default 8192.
  size_t max_piece_len;
  /// The most bytes of the workspace; where they have no room for a piece of `max_piece_len`, pieces are shorter. Default
  /// 1 GiB.
  size_t max_workspace_bytes;
} ts_prefill_config;

/// Sizes of pieces.
typedef struct ts_pieces_info {
  /// Pieces.
  size_t num_pieces;
  /// Blocks of all pieces.
  size_t num_blocks;
  /// Query tokens of all pieces: the leading dimension of `q`, `k`, `v` and `out`.
  size_t num_query_tokens;
  /// Tokens of a block; the last one of a prompt may have fewer.
  size_t block_len;
} ts_pieces_info;

/// Is told after each piece of a layer how many query tokens are done, and of how many; on a GPU, when the work is in the
/// stream. `user_data` is what was given with it. Answers 0 to go on, anything else to stop. Must not unwind.
typedef int32_t (*ts_progress)(void *user_data, size_t done, size_t total);

/// Work to record: calls of this library on the device that is captured. `user_data` is what `ts_capture` was given.
/// Answers 0 if all went well. Must not unwind.
typedef int32_t (*ts_work)(void *user_data);

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

/// `TS_ABI_VERSION` of the library that was loaded, to be compared with that of the header.
uint32_t ts_abi_version(void);

/// Version of the library: `0.1.0`. Static, never null.
const char *ts_version(void);

/// Text of the last error that a function answered in this thread, UTF-8; empty before the first. Never null. It names
/// the argument, the rule it broke and the numbers.
///
/// Belongs to the library and is valid until the next function of the library that this thread calls.
const char *ts_last_error_message(void);

/// Name of a status: `TS_STATUS_OUT_OF_PAGES`; `unknown status` for a number that is none. Static, never null.
const char *ts_status_name(int32_t status);

/// The processor. Pointers given to its handles are the host's.
///
/// Promised by the caller:
/// - `device` is null or has room for a pointer, written: the new handle, null on an error.
ts_status ts_device_cpu(struct ts_device **device);

/// CUDA device `ordinal`, in its primary context (which the CUDA runtime and PyTorch use), on a stream of its own,
/// which does not wait for the default stream.
///
/// Errors: `TS_STATUS_DRIVER` without a driver or such a device, `TS_STATUS_UNSUPPORTED` below compute capability 8.0
/// or in a build without CUDA.
///
/// Promised by the caller:
/// - `device` is null or has room for a pointer, written: the new handle, null on an error.
ts_status ts_device_cuda(uint32_t ordinal,
                         struct ts_device **device);

/// CUDA device `ordinal`, with all work put in a stream of the caller's: a `CUstream` or `cudaStream_t`, null for the
/// default stream. Uses the current context if it belongs to that device, else the primary one.
///
/// Errors: those of `ts_device_cuda`.
///
/// Promised by the caller:
/// - `stream` is null or a stream of that context, not `CU_STREAM_PER_THREAD`, and lives until the device and all that
///   was made on it are destroyed.
/// - A kernel of the caller's own that lets the next launch begin early (`griddepcontrol.launch_dependents`) has by
///   then written all that this device reads: queries, keys, values, pages, lists.
/// - `device` is null or has room for a pointer, written: the new handle, null on an error.
ts_status ts_device_cuda_on_stream(uint32_t ordinal,
                                   void *stream,
                                   struct ts_device **device);

/// The GPU kernels, run on the processor by an emulator that reports races, accesses out of bounds and divergence as
/// `TS_STATUS_LAUNCH`: for tests. Memory comes from `ts_buffer_create`. `seed` is 0 for lanes in order, else it draws
/// the schedule.
///
/// Errors: `TS_STATUS_UNSUPPORTED` in a build without the emulator.
///
/// Promised by the caller:
/// - `device` is null or has room for a pointer, written: the new handle, null on an error.
ts_status ts_device_emulated(uint64_t seed,
                             struct ts_device **device);

/// Short name: `cpu`, `emulated`, `cuda:0 (NVIDIA H200)`. Null for a null device.
///
/// Promised by the caller:
/// - `device` is null or a handle. The text lives as long as the handle.
const char *ts_device_name(const struct ts_device *device);

/// Whether a device can run steps of a configuration: what `ts_context_create` would answer for all operations, without
/// its allocations. For some of them, ask `ts_workspace_bytes`.
///
/// Errors: `TS_STATUS_UNSUPPORTED` where the device has no kernels for it, with a text that says what it lacks;
/// `TS_STATUS_CONFIG`, `TS_STATUS_UNKNOWN_ENUM`, `TS_STATUS_STRUCT_SIZE`.
///
/// Promised by the caller:
/// - `device` is null or a handle; `config` is null or holds `config->struct_size` bytes.
ts_status ts_device_supports(const struct ts_device *device,
                             const struct ts_config *config);

/// Waits until everything put on the device is done.
///
/// Errors: `TS_STATUS_DRIVER` where something failed, `TS_STATUS_MISSING` while work is being captured.
///
/// Promised by the caller:
/// - `device` is null or a handle.
ts_status ts_device_synchronize(const struct ts_device *device);

/// Gives a device back. Null is nothing. What was made on it stays usable.
///
/// Promised by the caller:
/// - `device` is null or a handle, used for the last time.
ts_status ts_device_destroy(struct ts_device *device);

/// Allocates `num_bytes`, zeroed, aligned to at least 256 bytes on a GPU and 8 on the processor.
///
/// Errors: `TS_STATUS_OUT_OF_MEMORY`.
///
/// Promised by the caller:
/// - `device` is null or a handle.
/// - `buffer` is null or has room for a pointer, written: the new handle, null on an error.
ts_status ts_buffer_create(const struct ts_device *device,
                           size_t num_bytes,
                           struct ts_buffer **buffer);

/// Address of the first byte: the device's, or the host's for the processor.
///
/// Promised by the caller:
/// - `buffer` is null or a handle; the memory lives as long as it.
/// - `data` is null or has room for a pointer, written.
ts_status ts_buffer_data(struct ts_buffer *buffer, void **data);

/// Frees a buffer, after the device's earlier work. Null is nothing.
///
/// Promised by the caller:
/// - `buffer` is null or a handle, used for the last time; no pointer into it is used any more.
ts_status ts_buffer_destroy(struct ts_buffer *buffer);

/// Copies `num_bytes`, an even number, from the host to memory of the device, after the device's earlier work. The
/// host's bytes may be changed as soon as this returns.
///
/// Errors: `TS_STATUS_NULL_POINTER`, `TS_STATUS_MISALIGNED`, `TS_STATUS_CONFIG` for an odd size, `TS_STATUS_DRIVER`.
///
/// Promised by the caller:
/// - `device` is null or a handle.
/// - `to` is memory of the device (of the host for the processor) with room for `num_bytes`, aligned to 16 bytes on a
///   GPU and 2 on the processor.
/// - `from` holds `num_bytes` of host memory, aligned to 2 bytes, apart from `to`.
ts_status ts_memory_write(const struct ts_device *device,
                          void *to,
                          const void *from,
                          size_t num_bytes);

/// Copies `num_bytes`, an even number, from memory of the device to the host. Waits for the device's earlier work.
///
/// Errors: as `ts_memory_write`.
///
/// Promised by the caller:
/// - As for `ts_memory_write`, with `from` on the device and `to` on the host.
ts_status ts_memory_read(const struct ts_device *device,
                         void *to,
                         const void *from,
                         size_t num_bytes);

/// Fills a configuration with defaults: 32 query heads and 8 KV heads of 128, bf16, 128 initial, 2048 chosen and 512
/// local tokens, native positions, Selection Cache on.
///
/// `struct_size` is `sizeof(ts_config)`; it is written to `config->struct_size`.
/// Errors: `TS_STATUS_STRUCT_SIZE` where it is less than that of the first version.
///
/// Promised by the caller:
/// - `config` is null or has room for `struct_size` bytes, written.
ts_status ts_config_default(struct ts_config *config,
                            size_t struct_size);

/// Fills limits with defaults: 1 row, blocks of 512, 131072 tokens, all operations. `struct_size` is
/// `sizeof(ts_limits)`.
///
/// Promised by the caller:
/// - `limits` is null or has room for `struct_size` bytes, written.
ts_status ts_limits_default(struct ts_limits *limits,
                            size_t struct_size);

/// Fills the configuration of an owned cache with defaults: 1 layer, 1024 pages of 16 tokens, 16 sequences, NHD.
/// `struct_size` is `sizeof(ts_cache_config)`.
///
/// Promised by the caller:
/// - `config` is null or has room for `struct_size` bytes, written.
ts_status ts_cache_config_default(struct ts_cache_config *config,
                                  size_t struct_size);

/// Checks every field of a configuration. Errors: `TS_STATUS_CONFIG`, `TS_STATUS_UNKNOWN_ENUM`,
/// `TS_STATUS_STRUCT_SIZE`, naming the first field that breaks its rule.
///
/// Promised by the caller:
/// - `config` is null or holds `config->struct_size` bytes.
ts_status ts_config_validate(const struct ts_config *config);

/// Validates the configuration and allocates a workspace, `ts_workspace_bytes` in all, for batches within the limits.
///
/// On a GPU this loads the kernels of the operations in `limits`, which takes seconds the first time that its driver
/// compiles them. One of whole steps (`ts_step`) needs all operations.
///
/// Errors: `TS_STATUS_OUT_OF_MEMORY`, `TS_STATUS_UNSUPPORTED` where a GPU has no kernel for the configuration
/// (`ts_device_supports` tells before), `TS_STATUS_CONFIG`, `TS_STATUS_UNKNOWN_ENUM`, `TS_STATUS_STRUCT_SIZE`,
/// `TS_STATUS_DRIVER`.
///
/// Promised by the caller:
/// - `device` is null or a handle; `config` and `limits` are null or hold as many bytes as their `struct_size`.
/// - `context` is null or has room for a pointer, written: the new handle, null on an error.
ts_status ts_context_create(const struct ts_device *device,
                            const struct ts_config *config,
                            const struct ts_limits *limits,
                            struct ts_context **context);

/// Bytes of the workspace that `ts_context_create` would allocate with the same arguments. Allocates nothing on the
/// device.
///
/// Errors: as `ts_context_create`.
///
/// Promised by the caller:
/// - As for `ts_context_create`; `num_bytes` is null or has room for a number, written.
ts_status ts_workspace_bytes(const struct ts_device *device,
                             const struct ts_config *config,
                             const struct ts_limits *limits,
                             size_t *num_bytes);

/// Gives a context back, after the device's earlier work. Null is nothing.
///
/// Promised by the caller:
/// - `context` is null or a handle, used for the last time; so are pointers into its workspace.
ts_status ts_context_destroy(struct ts_context *context);

/// One buffer of the workspace, a `ts_workspace`, for a collective that reads or changes it between two operations, or
/// for results of the caller's own (`ts_context_provide`). Its address never changes.
///
/// Errors: `TS_STATUS_UNKNOWN_ENUM`.
///
/// Promised by the caller:
/// - `context` is null or a handle that nothing else uses meanwhile; the address is valid as long as it.
/// - `tensor` is null or has room for the structure, written.
ts_status ts_context_workspace(struct ts_context *context,
                               int32_t buffer,
                               struct ts_tensor *tensor);

/// Says that a buffer of the workspace, a `ts_workspace`, holds results of the caller's own for a batch: votes of a
/// policy of one's own, for `ts_top_k` to choose from, or lists for `ts_attend`.
///
/// Queries, similarities and actions stand for what pool writes, products for what compare does, logits and statistics
/// for what score does, the selected tokens and their lengths for what top-k does: all of them are to be there. On a GPU they are not looked at:
/// what is made of results that break a rule, such as lists that do not ascend, is not specified.
///
/// Errors: `TS_STATUS_ORDER` for products, logits, statistics and votes without `ts_pool` of the same batch before, for
/// all of these but products also after `ts_compare` without `ts_decide`,
/// `TS_STATUS_MISSING` for a batch whose slot holds another, `TS_STATUS_UNKNOWN_ENUM`.
///
/// Promised by the caller:
/// - `context` and `batch` are null or handles; nothing else uses `context` meanwhile.
ts_status ts_context_provide(struct ts_context *context,
                             int32_t buffer,
                             const struct ts_batch *batch);

/// Index into the elements of `TS_WORKSPACE_LOGITS` of a query head's logit for a token of a row: `token` counts from
/// the row's first, chosen or not.
///
/// Errors: `TS_STATUS_INDEX` where the batch has no such row, the row no such token (none is known of tables on the
/// device) or the configuration no such head, `TS_STATUS_LIMIT`.
///
/// Promised by the caller:
/// - `context` and `batch` are null or handles; nothing changes `context` meanwhile.
/// - `index` is null or has room for a number, written.
ts_status ts_context_logit_index(const struct ts_context *context,
                                 const struct ts_batch *batch,
                                 size_t row,
                                 size_t token,
                                 size_t qo_head,
                                 size_t *index);

/// Copies the selected tokens of one row of the current batch, ascending, to the host. Waits for the device's earlier
/// work. With `tokens` null and `capacity` 0, only tells the length.
///
/// Errors: `TS_STATUS_INDEX` where there is no such row, `TS_STATUS_CAPACITY` where the list is longer than `capacity`
/// (then `len` is written nevertheless).
///
/// Promised by the caller:
/// - `context` is null or a handle that nothing changes meanwhile.
/// - `tokens` is null or has room for `capacity` entries in the host's memory, `len` of them written.
/// - `len` is null or has room for a number, written.
ts_status ts_context_selected(const struct ts_context *context,
                              size_t row,
                              uint32_t *tokens,
                              size_t capacity,
                              size_t *len);

/// Sets all strides of a view to those of dense pools of its `num_pages`, `page_size`, `num_kv_heads` and `head_dim`.
/// `layout` is a `ts_kv_layout`.
///
/// Errors: `TS_STATUS_STRUCT_SIZE`, `TS_STATUS_UNKNOWN_ENUM`, `TS_STATUS_CONFIG` where a page does not fit the address
/// space.
///
/// Promised by the caller:
/// - `kv` is null or a view of `kv->struct_size` bytes that nothing else uses meanwhile, its strides written.
ts_status ts_kv_view_set_dense(struct ts_kv_view *kv,
                               int32_t layout);

/// A batch over page tables of another engine.
///
/// Errors: `TS_STATUS_TABLE`, naming table, row, rule and entry, `TS_STATUS_CONFIG` for the page size,
/// `TS_STATUS_LIMIT` for too many rows, `TS_STATUS_STRUCT_SIZE`.
///
/// Promised by the caller:
/// - `tables` is null or a structure of `tables->struct_size` bytes whose pointers are null or name arrays of the
///   stated lengths in the host's memory. They are not used after this returns.
/// - `batch` is null or has room for a pointer, written: the new handle, null on an error.
ts_status ts_batch_create(const struct ts_batch_tables *tables,
                          struct ts_batch **batch);

/// A copy of a batch with rows of no cached tokens added, until it has `num_rows`: the shape that captured work
/// expects. Each has `block_len` queries, for which `out = 0` and `lse = -inf` are written and nothing else is done.
///
/// Errors: `TS_STATUS_LIMIT` where the batch has more rows already, `TS_STATUS_CONFIG` for more than can be counted,
/// `TS_STATUS_MISSING` where the tables are the device's alone.
///
/// Promised by the caller:
/// - `batch` is null or a handle.
/// - `padded` is null or has room for a pointer, written: the new handle, null on an error.
ts_status ts_batch_padded(const struct ts_batch *batch,
                          size_t num_rows,
                          size_t block_len,
                          struct ts_batch **padded);

/// The same tokens with every row cut into blocks of `block_len` tokens, the last of which may be shorter: for a piece of a prompt that
/// is longer than the blocks that it is processed in. A block is a row that selects for itself; blocks of one row read its keys
/// together. The order of query tokens stays. Their selections are neither taken from a Selection Cache nor put there, and what it
/// holds for their sequences is dropped.
///
/// `block_len` is a dial between speed and fidelity: all queries of a block share one list, chosen by their mean. Every block counts in
/// the limits `max_rows` and, with all tokens before it, `max_kv_tokens`.
///
/// Errors: `TS_STATUS_CONFIG` for blocks of no tokens, `TS_STATUS_LIMIT` for too many of them, `TS_STATUS_MISSING` where the rows are
/// parts of sequences, blocks already, or the device's alone.
///
/// Promised by the caller:
/// - `batch` is null or a handle.
/// - `blocks` is null or has room for a pointer, written: the new handle, null on an error.
ts_status ts_batch_in_blocks(const struct ts_batch *batch,
                             size_t block_len,
                             struct ts_batch **blocks);

/// Sizes of a batch. `max_kv_len` and `num_token_places` are upper bounds where the tables are the device's alone.
///
/// Promised by the caller:
/// - `batch` is null or a handle; `info` is null or has room for the structure, written.
ts_status ts_batch_get_info(const struct ts_batch *batch,
                            struct ts_batch_info *info);

/// Sizes and places of one row. Errors: `TS_STATUS_INDEX` where there is no such row, `TS_STATUS_MISSING` where the
/// tables are the device's alone.
///
/// Promised by the caller:
/// - `batch` is null or a handle; `info` is null or has room for the structure, written.
ts_status ts_batch_get_row(const struct ts_batch *batch,
                           size_t row,
                           struct ts_batch_row *info);

/// Gives a batch back. Null is nothing. On a GPU, its tables are freed after the device's earlier work.
///
/// Promised by the caller:
/// - `batch` is null or a handle, used for the last time.
ts_status ts_batch_destroy(struct ts_batch *batch);

/// A place for batches with the rows, blocks and page size of `like` and up to `max_pages` pages in all rows together.
///
/// Errors: `TS_STATUS_WRONG_DEVICE` for the processor, `TS_STATUS_LIMIT` for more pages than can be counted,
/// `TS_STATUS_OUT_OF_MEMORY`.
///
/// Promised by the caller:
/// - `device` and `like` are null or handles.
/// - `slot` is null or has room for a pointer, written: the new handle, null on an error.
ts_status ts_batch_slot_create(const struct ts_device *device,
                               const struct ts_batch *like,
                               size_t max_pages,
                               struct ts_batch_slot **slot);

/// Puts a copy of a batch in the slot, after the device's earlier work: work captured with `bound` reads whatever batch
/// was put there last when it is launched.
///
/// What was captured with a batch of this slot stays within its bounds: what the captured operations would refuse is
/// refused here, with the same statuses, and the slot holds what it held before.
///
/// Errors: `TS_STATUS_TABLE` where rows, blocks or page size are not the slot's, `TS_STATUS_LIMIT` for too many pages,
/// `TS_STATUS_INDEX` for pages and sequences beyond those of captured work, `TS_STATUS_MISSING` for a batch of
/// `ts_batch_slot_translate`.
///
/// Promised by the caller:
/// - `slot` and `batch` are null or handles; nothing else uses `slot` meanwhile.
/// - `bound` is null or has room for a pointer, written: the new handle, null on an error.
ts_status ts_batch_slot_put(struct ts_batch_slot *slot,
                            const struct ts_batch *batch,
                            struct ts_batch **bound);

/// Puts the batch that an engine's tables on the device describe in the slot, in the device's order of work. Its rows
/// and blocks are the slot's; lengths and pages are the device's alone. Nothing passes through the host: this can be
/// captured, and does its work anew at each launch.
///
/// `bound` has no rows to be asked for: `ts_batch_get_row` answers `TS_STATUS_MISSING` and `ts_batch_get_info` the
/// largest that they may be.
///
/// Errors: `TS_STATUS_TABLE` where `sequence_indices` are given to a slot without them or the other way round,
/// `TS_STATUS_CONFIG` for no pages, `TS_STATUS_MISSING` where the slot is for parts of sequences, `TS_STATUS_LIMIT` and
/// `TS_STATUS_INDEX` where captured work may not be given as much, `TS_STATUS_UNKNOWN_ENUM`, `TS_STATUS_STRUCT_SIZE`
/// and those of pointers, which are aligned to 4 bytes.
///
/// Promised by the caller:
/// - `slot` is null or a handle that nothing else uses meanwhile.
/// - `tables` is null or a structure of `tables->struct_size` bytes whose pointers are null or name arrays of the
///   stated lengths in memory of the slot's device, which live, unchanged, until its work is done, and while captured
///   work is launched.
/// - `bound` is null or has room for a pointer, written: the new handle, null on an error.
ts_status ts_batch_slot_translate(struct ts_batch_slot *slot,
                                  const struct ts_device_tables *tables,
                                  struct ts_batch **bound);

/// How many rows `ts_batch_slot_translate` left without tokens, pages it replaced and sequences it left out since the
/// slot was made. Waits for the device's earlier work.
///
/// Errors: `TS_STATUS_DRIVER`, `TS_STATUS_MISSING` while work is being captured.
///
/// Promised by the caller:
/// - `slot` is null or a handle that nothing else uses meanwhile; `num_faults` is null or has room for a number,
///   written.
ts_status ts_batch_slot_faults(const struct ts_batch_slot *slot,
                               uint32_t *num_faults);

/// Gives a slot back. Null is nothing.
///
/// Promised by the caller:
/// - `slot` is null or a handle, used for the last time; no captured work that reads it is launched any more.
ts_status ts_batch_slot_destroy(struct ts_batch_slot *slot);

/// Writes the keys and values of each row's block into its pages.
///
/// Of `input` this reads `k` and `v`. Writes `kv`.
///
/// Errors: `TS_STATUS_SHAPE` where `kv` is not as the configuration says, `TS_STATUS_INDEX` for a page number beyond
/// the pool, `TS_STATUS_TABLE` for a page that is written and appears twice in the batch, `TS_STATUS_LIMIT`,
/// `TS_STATUS_CONFIG` for strides that the device cannot go, `TS_STATUS_MISSING` for parts of sequences, a batch whose
/// slot holds another, and a context without `TS_OPERATION_APPEND`, `TS_STATUS_OVERLAP`, `TS_STATUS_STRUCT_SIZE` and
/// those of pointers. Then nothing was written.
///
/// Promised by the caller:
/// - `context` and `batch` are null or handles.
/// - `kv` is null or a view whose memory, from the first element to the last of keys and values together where they lie
///   among each other, is the device's, and in which no element is a key's and a value's; `input` is null or a structure
///   of `struct_size` bytes, whose tensors, from the first element to the last, are the device's. All memory is valid
///   until the device's work is done, and nothing else uses the pages of the batch meanwhile.
ts_status ts_append(const struct ts_context *context,
                    const struct ts_batch *batch,
                    const struct ts_kv_view *kv,
                    const struct ts_step_input *input);

/// `ts_pool`, `ts_score`, `ts_vote` and `ts_top_k` in one: the tokens to attend to, left in `TS_WORKSPACE_SELECTED`.
///
/// Of `input` this reads `q`. With `selection_cache`, whose `layer` is used, selections of rows that name their sequence
/// may be used again; null selects anew.
///
/// Errors: those of the four operations, `TS_STATUS_ORDER` excepted; then nothing was written.
///
/// Promised by the caller:
/// - Handles are null or handles of one device; nothing else uses `context` and `selection_cache` meanwhile.
/// - `kv` and `input` are null or structures of `struct_size` bytes; their memory is the device's and unchanged until its
///   work is done.
ts_status ts_select(struct ts_context *context,
                    const struct ts_batch *batch,
                    const struct ts_kv_view *kv,
                    const struct ts_step_input *input,
                    struct ts_selection_cache *selection_cache,
                    size_t layer);

/// `ts_append`, then `ts_select`, in fewer launches where blocks are short; with `ts_attend` after it, a step over a
/// borrowed cache.
///
/// `selection_cache` and `layer` are as for `ts_select`. Writes `kv`. (A layer of a `ts_cache` comes from `ts_cache_layer_mut`, which
/// counts its tokens as written; `ts_step` and `ts_cache_append` count what they write themselves.)
///
/// Errors: those of the two, `TS_STATUS_ORDER` excepted; then nothing was written.
///
/// Promised by the caller:
/// - As for `ts_append` and `ts_select`.
ts_status ts_append_select(struct ts_context *context,
                           const struct ts_batch *batch,
                           const struct ts_kv_view *kv,
                           const struct ts_step_input *input,
                           struct ts_selection_cache *selection_cache,
                           size_t layer);

/// Mean of the queries of each block, its cosine with the cached one, and what is to be done for the row. Writes
/// `TS_WORKSPACE_QUERIES`, `_SIMILARITIES` and `_ACTIONS`; changes nothing in `selection_cache`.
///
/// `input` and `selection_cache` are as for `ts_select`. Errors: `TS_STATUS_LIMIT`, `TS_STATUS_INDEX` for a sequence or
/// layer that the Selection Cache does not have, `TS_STATUS_SHAPE` where that is of another configuration,
/// `TS_STATUS_CONFIG` for strides that the device cannot go, `TS_STATUS_MISSING` for a batch whose slot holds another, a
/// batch without `sequence_indices` where a Selection Cache is given, and a context without `TS_OPERATION_POOL`, `TS_STATUS_STRUCT_SIZE` and those of pointers.
///
/// Promised by the caller:
/// - As for `ts_select`.
ts_status ts_pool(struct ts_context *context,
                  const struct ts_batch *batch,
                  const struct ts_step_input *input,
                  struct ts_selection_cache *selection_cache,
                  size_t layer);

/// What the cosines are made of, where ranks share the heads of a layer (tensor parallelism): `TS_WORKSPACE_PRODUCTS` of
/// this context's heads, to be added over all ranks before `ts_decide`. Every rank then takes the same action, and chooses
/// the same tokens, as one context with all heads would, up to rounding; each has a Selection Cache for its own heads:
///
/// ```text
/// ts_pool with null;  ts_compare;  sum TS_WORKSPACE_PRODUCTS over ranks;  ts_decide
/// ts_score;           ts_vote;     sum TS_WORKSPACE_VOTES over ranks;     ts_top_k
/// ```
///
/// Reads `TS_WORKSPACE_QUERIES`; changes nothing in `selection_cache`. Actions are void until `ts_decide`.
///
/// Errors: `TS_STATUS_ORDER` without `ts_pool` of the same batch before it, and those of `ts_pool`.
///
/// Promised by the caller:
/// - As for `ts_select`.
ts_status ts_compare(struct ts_context *context,
                     const struct ts_batch *batch,
                     struct ts_selection_cache *selection_cache,
                     size_t layer);

/// What is to be done for each row, by the sums of `TS_WORKSPACE_PRODUCTS` over all ranks. Writes
/// `TS_WORKSPACE_SIMILARITIES` and `_ACTIONS`; changes nothing in `selection_cache`. Pass what was passed to `ts_compare`.
///
/// Errors: `TS_STATUS_ORDER` without `ts_compare` of the same batch before it, and those of `ts_pool`.
///
/// Promised by the caller:
/// - As for `ts_select`.
ts_status ts_decide(struct ts_context *context,
                    const struct ts_batch *batch,
                    struct ts_selection_cache *selection_cache,
                    size_t layer);

/// Scaled dot products of the scoring queries with the candidates' keys, and softmax statistics. Reads
/// `TS_WORKSPACE_QUERIES` and `_ACTIONS`, writes `_LOGITS` and `_STATS`.
///
/// Errors: `TS_STATUS_ORDER` without `ts_pool` of the same batch before it, or after `ts_compare` without `ts_decide`,
/// `TS_STATUS_SHAPE`, `TS_STATUS_LIMIT`, `TS_STATUS_INDEX` for a page number beyond the pool, `TS_STATUS_CONFIG` for strides that the device cannot go,
/// `TS_STATUS_MISSING` as `ts_pool`, and those of pointers.
///
/// Promised by the caller:
/// - As for `ts_select`.
ts_status ts_score(struct ts_context *context,
                   const struct ts_batch *batch,
                   const struct ts_kv_view *kv);

/// Votes: softmax probabilities of the candidates, summed over heads. Reads `TS_WORKSPACE_ACTIONS`, `_LOGITS` and
/// `_STATS`, writes `_VOTES`. With tensor parallelism, sum these over the ranks before `ts_top_k`.
///
/// Errors: `TS_STATUS_ORDER` without `ts_score` of the same batch before it, `TS_STATUS_LIMIT`, `TS_STATUS_MISSING` as
/// `ts_pool`.
///
/// Promised by the caller:
/// - `context` and `batch` are null or handles; nothing else uses `context` meanwhile.
ts_status ts_vote(struct ts_context *context,
                  const struct ts_batch *batch);

/// The `top_k` largest votes of each row (larger first, equal votes by smaller index, NaN last) and the selected lists.
/// Reads `TS_WORKSPACE_ACTIONS`, `_VOTES` and `_QUERIES`, writes `_POOLED_VOTES`, `_TOP_K`, `_SELECTED` and
/// `_SELECTED_LEN`. With `selection_cache`, reused rows take their tokens from it, scored rows replace what it holds,
/// and every row is counted; pass what was passed to `ts_pool` or `ts_decide`.
///
/// Errors: `TS_STATUS_ORDER` without `ts_pool` and `ts_vote` of the same batch before it (or votes of one's own,
/// `ts_context_provide`), `TS_STATUS_LIMIT`, `TS_STATUS_INDEX`, `TS_STATUS_SHAPE`, `TS_STATUS_MISSING` as `ts_pool`
/// and, on the processor, where rows reuse a selection that is not given.
///
/// Promised by the caller:
/// - As for `ts_select`.
ts_status ts_top_k(struct ts_context *context,
                   const struct ts_batch *batch,
                   struct ts_selection_cache *selection_cache,
                   size_t layer);

/// `ts_vote`, then `ts_top_k` of these votes, which takes less than the two one by one. Arguments are those of
/// `ts_top_k`.
///
/// Errors: those of the two, `TS_STATUS_ORDER` without `ts_pool` and `ts_score` of the same batch before it. Then
/// nothing was written.
///
/// Promised by the caller:
/// - As for `ts_select`.
ts_status ts_vote_top_k(struct ts_context *context,
                        const struct ts_batch *batch,
                        struct ts_selection_cache *selection_cache,
                        size_t layer);

/// Attention over the selected lists of the workspace. Writes `output`.
///
/// Of `input` this reads `q`. Query `t` of a block of `T` sees the first `m - T + t + 1` of the `m` tokens of its row's
/// list. Rows whose list is empty get `out = 0` and `lse = -inf`.
///
/// Errors: `TS_STATUS_ORDER` without a selection of the same batch before it (or lists of one's own,
/// `ts_context_provide`), `TS_STATUS_SHAPE`, `TS_STATUS_ELEMENT_TYPE`, `TS_STATUS_LIMIT`, `TS_STATUS_INDEX`,
/// `TS_STATUS_CONFIG` for strides that the device cannot go, `TS_STATUS_TABLE` for a list on the processor that breaks
/// a rule, `TS_STATUS_OVERLAP`, `TS_STATUS_STRUCT_SIZE`, `TS_STATUS_MISSING` for parts of sequences, a batch whose slot
/// holds another, and a context without `TS_OPERATION_ATTEND`, and those of pointers.
///
/// Promised by the caller:
/// - `context` and `batch` are null or handles; nothing changes the context meanwhile.
/// - `kv`, `input` and `output` are null or structures of `struct_size` bytes; all memory is the device's and valid until
///   its work is done, and nothing else uses the outputs meanwhile.
ts_status ts_attend(const struct ts_context *context,
                    const struct ts_batch *batch,
                    const struct ts_kv_view *kv,
                    const struct ts_step_input *input,
                    const struct ts_output *output);

/// As `ts_attend`, over all tokens of each row: ordinary paged attention.
///
/// Errors: those of `ts_attend`, `TS_STATUS_ORDER` excepted.
///
/// Promised by the caller:
/// - As for `ts_attend`.
ts_status ts_attend_dense(const struct ts_context *context,
                          const struct ts_batch *batch,
                          const struct ts_kv_view *kv,
                          const struct ts_step_input *input,
                          const struct ts_output *output);

/// As `ts_attend`, over lists of the caller's own, which may be parts of longer ones. Outputs over the parts of a list
/// are combined by `ts_merge`. Lists ascend, name tokens of their row only, and are no longer than `width`.
///
/// Errors: those of `ts_attend`, `TS_STATUS_ORDER` excepted, and `TS_STATUS_MISSING` for parts of sequences without
/// `ranks`. On a GPU the lists are not looked at: outputs of rows whose list breaks a rule are not specified.
///
/// Promised by the caller:
/// - As for `ts_attend`, and `selection` is null or a structure of `struct_size` bytes whose arrays are the device's
///   and unchanged until its work is done.
ts_status ts_attend_to(const struct ts_context *context,
                       const struct ts_batch *batch,
                       const struct ts_kv_view *kv,
                       const struct ts_step_input *input,
                       const struct ts_selection *selection,
                       const struct ts_output *output);

/// Combines attention outputs over disjoint parts of a list through their log-sum-exps. Writes `output`, whose
/// `out_dtype` may be f16, bf16 or f32.
///
/// Errors: those of pointers, `TS_STATUS_CONFIG` for 0 parts, `TS_STATUS_OVERLAP`, `TS_STATUS_STRUCT_SIZE`,
/// `TS_STATUS_UNSUPPORTED`.
///
/// Promised by the caller:
/// - `context` is null or a handle; `parts` and `output` are null or structures of `struct_size` bytes; all memory is
///   the device's and valid until its work is done, and nothing else uses the outputs meanwhile.
ts_status ts_merge(const struct ts_context *context,
                   const struct ts_parts *parts,
                   const struct ts_output *output);

/// An empty Selection Cache on a device: `num_layers * num_sequences * (num_qo_heads * head_dim + top_k) * 4` bytes.
///
/// Errors: `TS_STATUS_OUT_OF_MEMORY`, `TS_STATUS_CONFIG` where `config` or a number breaks a rule,
/// `TS_STATUS_UNKNOWN_ENUM`, `TS_STATUS_STRUCT_SIZE`, `TS_STATUS_DRIVER`.
///
/// Promised by the caller:
/// - `device` is null or a handle; `config` is null or holds `config->struct_size` bytes.
/// - `selections` is null or has room for a pointer, written: the new handle, null on an error.
ts_status ts_selection_cache_create(const struct ts_device *device,
                                    const struct ts_config *config,
                                    size_t num_layers,
                                    size_t num_sequences,
                                    struct ts_selection_cache **selections);

/// Forgets the selections of one sequence, in all layers. Errors: `TS_STATUS_INDEX`.
///
/// Promised by the caller:
/// - `selections` is null or a handle that nothing else uses meanwhile.
ts_status ts_selection_cache_clear(struct ts_selection_cache *selections, size_t sequence);

/// Copies the selections of sequence `src` to `dst`, in all layers. Errors: `TS_STATUS_INDEX`.
///
/// Promised by the caller:
/// - `selections` is null or a handle that nothing else uses meanwhile.
ts_status ts_selection_cache_fork(struct ts_selection_cache *selections, size_t src, size_t dst);

/// Forgets those selections of a sequence cut to `len` tokens that could name a token that is gone. Errors:
/// `TS_STATUS_INDEX`.
///
/// Promised by the caller:
/// - `selections` is null or a handle that nothing else uses meanwhile.
ts_status ts_selection_cache_truncate(struct ts_selection_cache *selections,
                                      size_t sequence,
                                      size_t len);

/// What was done so far, summed over layers. Waits for the device's earlier work.
///
/// Promised by the caller:
/// - `selections` is null or a handle that nothing else uses meanwhile; `stats` is null or has room for the structure,
///   written.
ts_status ts_selection_cache_stats(struct ts_selection_cache *selections,
                                   struct ts_selection_stats *stats);

/// What was done so far in one layer. Waits for the device's earlier work. Errors: `TS_STATUS_INDEX`.
///
/// Promised by the caller:
/// - As for `ts_selection_cache_stats`.
ts_status ts_selection_cache_layer_stats(struct ts_selection_cache *selections,
                                         size_t layer,
                                         struct ts_selection_stats *stats);

/// Sets all counters to 0; cached selections stay.
///
/// Promised by the caller:
/// - `selections` is null or a handle that nothing else uses meanwhile.
ts_status ts_selection_cache_reset_stats(struct ts_selection_cache *selections);

/// Gives a Selection Cache back, after the device's earlier work. Null is nothing. Those of a `ts_cache` stay in it.
///
/// Promised by the caller:
/// - `selections` is null or a handle, used for the last time.
ts_status ts_selection_cache_destroy(struct ts_selection_cache *selections);

/// Allocates an empty cache on a device, with a Selection Cache if `config` asks for one: `2 * num_layers * num_pages *
/// page_size * num_kv_heads * head_dim` elements.
///
/// Errors: `TS_STATUS_OUT_OF_MEMORY`, `TS_STATUS_CONFIG`, `TS_STATUS_UNKNOWN_ENUM`, `TS_STATUS_STRUCT_SIZE`,
/// `TS_STATUS_DRIVER`.
///
/// Promised by the caller:
/// - `device` is null or a handle; `config` and `cache_config` are null or hold as many bytes as their `struct_size`.
/// - `cache` is null or has room for a pointer, written: the new handle, null on an error.
ts_status ts_cache_create(const struct ts_device *device,
                          const struct ts_config *config,
                          const struct ts_cache_config *cache_config,
                          struct ts_cache **cache);

/// Gives a cache back, after the device's earlier work. Null is nothing.
///
/// Promised by the caller:
/// - `cache` is null or a handle, used for the last time; so are views of its layers and its selections.
ts_status ts_cache_destroy(struct ts_cache *cache);

/// Adds an empty sequence. Errors: `TS_STATUS_TOO_MANY_SEQUENCES`.
///
/// Promised by the caller:
/// - `cache` is null or a handle that nothing else uses meanwhile; `sequence` is null or has room for one, written.
ts_status ts_cache_sequence_create(struct ts_cache *cache,
                                   ts_sequence *sequence);

/// Adds a sequence with the same tokens and cached selections. Pages are shared until one of the two writes into them.
///
/// Errors: `TS_STATUS_UNKNOWN_SEQUENCE`, `TS_STATUS_TOO_MANY_SEQUENCES`.
///
/// Promised by the caller:
/// - `cache` is null or a handle that nothing else uses meanwhile; `child` is null or has room for one, written.
ts_status ts_cache_sequence_fork(struct ts_cache *cache,
                                 ts_sequence sequence,
                                 ts_sequence *child);

/// Drops the tokens of a sequence from `len` on, and every cached selection that could name one of them.
///
/// Errors: `TS_STATUS_UNKNOWN_SEQUENCE`, `TS_STATUS_TRUNCATE_BEYOND_END`.
///
/// Promised by the caller:
/// - `cache` is null or a handle that nothing else uses meanwhile.
ts_status ts_cache_sequence_truncate(struct ts_cache *cache,
                                     ts_sequence sequence,
                                     size_t len);

/// Ends a sequence; pages that no fork holds become free. Errors: `TS_STATUS_UNKNOWN_SEQUENCE`.
///
/// Promised by the caller:
/// - `cache` is null or a handle that nothing else uses meanwhile.
ts_status ts_cache_sequence_free(struct ts_cache *cache, ts_sequence sequence);

/// Tokens of a sequence. Errors: `TS_STATUS_UNKNOWN_SEQUENCE`.
///
/// Promised by the caller:
/// - `cache` is null or a handle that nothing changes meanwhile; `len` is null or has room for a number, written.
ts_status ts_cache_sequence_len(const struct ts_cache *cache,
                                ts_sequence sequence,
                                size_t *len);

/// Leading tokens of a sequence whose keys and values a layer has: less than `ts_cache_sequence_len` between
/// `ts_cache_extend` and the layer's step. A layer that was left out of a step, or whose step failed, stays behind, and
/// its next step answers `TS_STATUS_UNWRITTEN`. Two ways lead back: the layer's step with the batch that it missed,
/// which is valid until its sequences are truncated or forked; or `ts_cache_sequence_truncate` to the shortest of the
/// layers.
///
/// Errors: `TS_STATUS_UNKNOWN_SEQUENCE`, `TS_STATUS_INDEX` where there is no such layer.
///
/// Promised by the caller:
/// - `cache` is null or a handle that nothing changes meanwhile; `len` is null or has room for a number, written.
ts_status ts_cache_written_len(const struct ts_cache *cache,
                               size_t layer,
                               ts_sequence sequence,
                               size_t *len);

/// Pages that no sequence holds.
///
/// Promised by the caller:
/// - `cache` is null or a handle that nothing changes meanwhile; `num_pages` is null or has room for a number, written.
ts_status ts_cache_num_free_pages(const struct ts_cache *cache,
                                  size_t *num_pages);

/// Makes room for a block of new tokens of each sequence named, all or nothing, and hands out the batch whose rows are
/// these sequences in this order. Once for all layers. A length of 0 is a padding row.
///
/// A batch beyond the limits of a context is refused by its steps. Nothing is lost then: `ts_cache_sequence_truncate` takes
/// each sequence back to its length before, to be extended by less.
///
/// Errors: `TS_STATUS_OUT_OF_PAGES`, `TS_STATUS_UNKNOWN_SEQUENCE`, `TS_STATUS_DUPLICATE_SEQUENCE`,
/// `TS_STATUS_SEQUENCE_TOO_LONG`.
///
/// Promised by the caller:
/// - `cache` is null or a handle that nothing else uses meanwhile.
/// - `sequences` and `num_tokens` are null or hold `num_rows` entries.
/// - `batch` is null or has room for a pointer, written: the new handle, null on an error.
ts_status ts_cache_extend(struct ts_cache *cache,
                          const ts_sequence *sequences,
                          const size_t *num_tokens,
                          size_t num_rows,
                          struct ts_batch **batch);

/// A layer's keys and values, to read: for `ts_score`, `ts_select`, `ts_attend` and kernels of the caller's own. To
/// write them use `ts_cache_append`, or `ts_cache_layer_mut`, so that the cache knows of it.
///
/// `struct_size` is `sizeof(ts_kv_view)`; it is written to `kv->struct_size`. Errors: `TS_STATUS_INDEX` where there is
/// no such layer, `TS_STATUS_STRUCT_SIZE`.
///
/// Promised by the caller:
/// - `cache` is null or a handle that nothing changes meanwhile. The view is valid as long as the cache.
/// - `kv` is null or has room for `struct_size` bytes, written.
ts_status ts_cache_layer(const struct ts_cache *cache,
                         size_t layer,
                         struct ts_kv_view *kv,
                         size_t struct_size);

/// As `ts_cache_layer`, for kernels of the caller's own that write keys and values on a GPU: all tokens that the
/// sequences have now count as written in this layer. (On the processor use `ts_cache_append`.)
///
/// Errors: as `ts_cache_layer`.
///
/// Promised by the caller:
/// - As for `ts_cache_layer`, and nothing else uses `cache` meanwhile.
ts_status ts_cache_layer_mut(struct ts_cache *cache,
                             size_t layer,
                             struct ts_kv_view *kv,
                             size_t struct_size);

/// The Selection Cache of an owned cache, for `ts_select` and the like. A handle of its own, to be destroyed before the
/// cache; using it counts as using the cache.
///
/// Errors: `TS_STATUS_MISSING` where the cache has none.
///
/// Promised by the caller:
/// - `cache` is null or a handle that nothing else uses meanwhile.
/// - `selections` is null or has room for a pointer, written: the new handle, null on an error.
ts_status ts_cache_selections(struct ts_cache *cache,
                              struct ts_selection_cache **selections);

/// How often selections were reused and made, summed over layers; zeros without a Selection Cache. Waits for the
/// device's earlier work.
///
/// Promised by the caller:
/// - `cache` is null or a handle that nothing changes meanwhile; `stats` is null or has room for the structure,
///   written.
ts_status ts_cache_stats(const struct ts_cache *cache,
                         struct ts_selection_stats *stats);

/// Writes the keys and values of each row's block into the pages of a layer.
///
/// Of `input` this reads `k` and `v`, which are not the cache's own. `batch` comes from `ts_cache_extend`.
///
/// Errors: `TS_STATUS_UNWRITTEN` where the layer was left out of an earlier step (`ts_cache_written_len`),
/// `TS_STATUS_STALE_BATCH`, `TS_STATUS_UNKNOWN_SEQUENCE`, `TS_STATUS_INDEX` where there is no such layer,
/// `TS_STATUS_LIMIT`, `TS_STATUS_CONFIG` where positions are not the cache's and for strides that the device cannot go,
/// `TS_STATUS_MISSING` for a batch that this cache did not make, one whose slot holds another, and a context without
/// `TS_OPERATION_APPEND`, `TS_STATUS_OVERLAP`, `TS_STATUS_STRUCT_SIZE` and those of pointers. Then nothing was written.
///
/// Promised by the caller:
/// - Handles are null or handles; nothing else uses `cache` meanwhile.
/// - `input` is null or a structure of `struct_size` bytes, whose `k` and `v` are memory of the device that lives,
///   unchanged, until its work is done.
ts_status ts_cache_append(const struct ts_context *context,
                          struct ts_cache *cache,
                          size_t layer,
                          const struct ts_batch *batch,
                          const struct ts_step_input *input);

/// One step of one layer of an owned cache: append keys and values, select, attend.
///
/// `batch` comes from `ts_cache_extend`. Selections are reused if both the context's and the cache's configuration have
/// a Selection Cache. On a GPU this returns as soon as everything is in the stream; what was wrong with it by then is
/// found at a later call.
///
/// Errors: those of `ts_cache_append` and of `ts_attend`, `TS_STATUS_ORDER` excepted; the context needs all operations.
/// Then nothing was written. After an error of the device (`TS_STATUS_DRIVER`, `TS_STATUS_LAUNCH`) the layer counts as
/// not written, and the same step may be done again.
///
/// Promised by the caller:
/// - Handles are null or handles of one device; nothing else uses `context` and `cache` meanwhile.
/// - `input` and `output` are null or structures of `struct_size` bytes whose pointers are memory of the device with
///   the stated shapes, which lives, unchanged by others, until the device's work is done. Nothing is in the context's
///   workspace.
ts_status ts_step(struct ts_context *context,
                  struct ts_cache *cache,
                  size_t layer,
                  const struct ts_batch *batch,
                  const struct ts_step_input *input,
                  const struct ts_output *output);

/// As `ts_step`, with dense attention: append keys and values, attend to all tokens. Errors: those of `ts_step`; the
/// context needs `TS_OPERATION_APPEND` and `_ATTEND` alone.
///
/// Promised by the caller:
/// - As for `ts_step`.
ts_status ts_step_dense(struct ts_context *context,
                        struct ts_cache *cache,
                        size_t layer,
                        const struct ts_batch *batch,
                        const struct ts_step_input *input,
                        const struct ts_output *output);

/// Fills a configuration with defaults: blocks of 512, sequences of up to 131072 tokens, pieces of 8192, a workspace of
/// 1 GiB. `struct_size` is `sizeof(ts_prefill_config)`.
///
/// Promised by the caller:
/// - `prefill` is null or has room for `struct_size` bytes, written.
ts_status ts_prefill_config_default(struct ts_prefill_config *prefill,
                                    size_t struct_size);

/// A context that reads prompts, with a workspace of no more than `max_workspace_bytes`: its limits are as many blocks a
/// step as that and the piece have room for. It selects for blocks alone; decoding has a context of its own, over the same
/// cache.
///
/// Errors: `TS_STATUS_CONFIG` where a field breaks its rule, and where the workspace has no room for one block, with the
/// bytes that it needs; those of `ts_context_create`.
///
/// Promised by the caller:
/// - `device` is null or a handle; `config` and `prefill` are null or hold as many bytes as their `struct_size`.
/// - `context` is null or has room for a pointer, written: the new handle, null on an error.
ts_status ts_context_create_prefill(const struct ts_device *device,
                                    const struct ts_config *config,
                                    const struct ts_prefill_config *prefill,
                                    struct ts_context **context);

/// Makes room for whole prompts: `ts_cache_extend` by any number of new tokens of each sequence, cut into blocks of
/// `block_len` tokens, and these into pieces within the limits of `context`. A context of `ts_context_create_prefill` takes
/// blocks of any length up to its own.
///
/// Errors: `TS_STATUS_LIMIT` where a block alone is beyond the limits, `TS_STATUS_CONFIG` for blocks of no tokens, and those
/// of `ts_cache_extend`. Then nothing grew.
///
/// Promised by the caller:
/// - `cache` and `context` are null or handles; nothing else uses `cache` meanwhile.
/// - `sequences` and `num_tokens` are null or hold `num_rows` entries.
/// - `pieces` is null or has room for a pointer, written: the new handle, null on an error.
ts_status ts_cache_extend_in_pieces(struct ts_cache *cache,
                                    const struct ts_context *context,
                                    const ts_sequence *sequences,
                                    const size_t *num_tokens,
                                    size_t num_rows,
                                    size_t block_len,
                                    struct ts_pieces **pieces);

/// The pieces of another engine's prompts. The batch has all tokens of each prompt in one row; the rest is as for
/// `ts_cache_extend_in_pieces`.
///
/// Errors: `TS_STATUS_LIMIT` where a block alone is beyond the limits of `context`, `TS_STATUS_CONFIG` for blocks of no
/// tokens, `TS_STATUS_MISSING` where the rows are parts of sequences, blocks already, or the device's alone.
///
/// Promised by the caller:
/// - `batch` and `context` are null or handles.
/// - `pieces` is null or has room for a pointer, written: the new handle, null on an error.
ts_status ts_batch_in_pieces(const struct ts_batch *batch,
                             const struct ts_context *context,
                             size_t block_len,
                             struct ts_pieces **pieces);

/// Sizes of pieces.
///
/// Promised by the caller:
/// - `pieces` is null or a handle; `info` is null or has room for the structure, written.
ts_status ts_pieces_get_info(const struct ts_pieces *pieces, struct ts_pieces_info *info);

/// Gives pieces back. Null is nothing. On a GPU, their tables are freed after the device's earlier work.
///
/// Promised by the caller:
/// - `pieces` is null or a handle, used for the last time.
ts_status ts_pieces_destroy(struct ts_pieces *pieces);

/// Reads prompts in one layer of an owned cache: for each piece in turn, appends its keys and values, selects for its blocks,
/// attends, and calls `progress`, which may be null. The result is that of a `ts_step` for each piece, bit by bit: a block
/// selects from the tokens before it with its own windows.
///
/// `pieces` come from `ts_cache_extend_in_pieces`; `input` and `output` have the query tokens of all of them. Cached
/// selections of the sequences that grow are dropped. Where `progress` stops, this answers `TS_STATUS_OK`.
///
/// Errors: those of `ts_step`, and `TS_STATUS_MISSING` while work is captured. All of these are found before the first piece,
/// and then nothing was written. After a stop, or an error of the device (`TS_STATUS_DRIVER`, `TS_STATUS_LAUNCH`), the layer
/// and the outputs have the pieces before it (`ts_cache_written_len`). The same call may be made again, and begins anew; or
/// `ts_cache_sequence_truncate` takes the sequences back to what all layers have.
///
/// Promised by the caller:
/// - Handles are null or handles of one device; nothing else uses `context` and `cache` meanwhile, `progress` neither.
/// - `input` and `output` are as for `ts_step`.
/// - `progress` is null or may be called with `user_data` and does not unwind.
ts_status ts_prefill(struct ts_context *context,
                     struct ts_cache *cache,
                     size_t layer,
                     const struct ts_pieces *pieces,
                     const struct ts_step_input *input,
                     const struct ts_output *output,
                     ts_progress progress,
                     void *user_data);

/// As `ts_prefill`, over another engine's memory: `pieces` come from `ts_batch_in_pieces`. What `selection_cache`, which may
/// be null, holds in `layer` for the sequences that grow is dropped.
///
/// Errors: those of `ts_append_select` and `ts_attend`, and `TS_STATUS_MISSING` while work is captured; found before the
/// first piece, as in `ts_prefill`.
///
/// Promised by the caller:
/// - As for `ts_append_select` and `ts_attend`; nothing else uses `context`, `selection_cache` and the pages of the pieces
///   meanwhile, `progress` neither.
/// - `progress` is null or may be called with `user_data` and does not unwind.
ts_status ts_prefill_kv(struct ts_context *context,
                        const struct ts_pieces *pieces,
                        const struct ts_kv_view *kv,
                        const struct ts_step_input *input,
                        const struct ts_output *output,
                        struct ts_selection_cache *selection_cache,
                        size_t layer,
                        ts_progress progress,
                        void *user_data);

/// Calls `work` and records what it puts on the device, instead of doing it: launching that costs the processor one
/// call for the whole of it.
///
/// Run the work once before: what it allocates at its first run (tables of a batch, angles) cannot be recorded. Batches
/// come from a `ts_batch_slot`, so that each launch reads the lengths and pages put there last.
///
/// Errors: `TS_STATUS_CALLBACK` where `work` does not answer 0, `TS_STATUS_MISSING` where it allocates, waits or copies
/// from or to the host, `TS_STATUS_UNSUPPORTED` on the processor. Then nothing was done.
///
/// Promised by the caller:
/// - `device` is null or a handle; `work` is null or may be called with `user_data` and does not unwind.
/// - `graph` is null or has room for a pointer, written: the new handle, null on an error.
ts_status ts_capture(const struct ts_device *device,
                     ts_work work,
                     void *user_data,
                     struct ts_graph **graph);

/// Does recorded work, after the device's earlier work. Does not wait for it.
///
/// Errors: `TS_STATUS_DRIVER`, or `TS_STATUS_LAUNCH` in the emulator.
///
/// Promised by the caller:
/// - `graph` is null or a handle that nothing else uses meanwhile.
/// - All memory, contexts, caches, batches and slots that the recorded work used are alive, and slots hold a batch.
ts_status ts_graph_launch(const struct ts_graph *graph);

/// Gives a graph back. Null is nothing.
///
/// Promised by the caller:
/// - `graph` is null or a handle, used for the last time.
ts_status ts_graph_destroy(struct ts_graph *graph);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* TOKENSELECT_H */
