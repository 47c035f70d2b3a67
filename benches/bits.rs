//! A fingerprint of every operation's results over fixed inputs: two commits whose kernels compute the same bits print the
//! same lines.
//!
//! `bits [--smoke] [--only NAME]`; `cargo bench --bench bits --` goes before it, or the built binary runs on its own. On a GPU the
//! contexts are long enough that every kernel of the device runs; `--smoke` runs short ones in the emulator, which needs no
//! GPU, and whose fingerprints differ from a GPU's in the last bits of exponentials. `--only` takes a part of a name.
//!
//! A line is the hash (FNV-1a of 64 bits, a word at a time) of one buffer after one operation of one case.

mod common;

use common::{HEADS, Layer, Pools, Spec, Step};
use half::{bf16, f16};
use tokenselect::{Buffer, DType, Device, HeadShape, Positions, Rope, RopePairing, Tensor};

type Error = Box<dyn std::error::Error>;

/// Bytes of keys from which on every device streams them.
const STREAMED_BYTES: usize = 450 << 20;
/// Tokens of a row that no cluster of blocks can choose among.
const BEYOND_CLUSTERS: usize = 4_400_000;

struct Options {
    smoke: bool,
    only: Option<String>,
}

impl Options {
    fn parse() -> Result<Self, Error> {
        let mut options = Options { smoke: false, only: None };
        let mut args = std::env::args().skip(1);
        while let Some(arg) = args.next() {
            match arg.as_str() {
                "--smoke" => options.smoke = true,
                "--bench" => {} // from cargo
                "--only" => options.only = Some(args.next().ok_or("--only needs a part of a name")?),
                _ => return Err(format!("unknown argument `{arg}`").into()),
            }
        }
        Ok(options)
    }
}

/// FNV-1a over words.
struct Hash(u64);

impl Hash {
    fn of(words: impl Iterator<Item = u32>) -> Hash {
        let fold = |hash: u64, word| (hash ^ u64::from(word)).wrapping_mul(0x0100_0000_01B3);
        Hash(words.fold(0xCBF2_9CE4_8422_2325, fold))
    }

    /// Of a tensor's elements. Waits for the device.
    fn of_tensor(tensor: &Tensor) -> tokenselect::Result<Hash> {
        Ok(match tensor.dtype() {
            DType::F16 => Hash::of(tensor.to_vec::<f16>()?.iter().map(|x| x.to_bits().into())),
            DType::Bf16 => Hash::of(tensor.to_vec::<bf16>()?.iter().map(|x| x.to_bits().into())),
            DType::U32 => Hash::of(tensor.to_vec::<u32>()?.into_iter()),
            _ => Hash::of(tensor.to_vec::<f32>()?.iter().map(|x| x.to_bits())),
        })
    }
}

/// One case: its name and what it computes.
struct Case {
    name: String,
    spec: Spec,
}

/// Windows small enough that short contexts are selected from.
fn short(heads: HeadShape, dtype: DType, tokens: usize, block_len: usize) -> Spec {
    let mut spec = Spec { block_len, ..Spec::decode(tokens) };
    (spec.config.heads, spec.config.dtype) = (heads, dtype);
    (spec.config.n_init, spec.config.n_local, spec.config.top_k) = (16, 40, 100);
    spec
}

fn heads(num_kv_heads: usize, group: usize, head_dim: usize) -> HeadShape {
    HeadShape { num_qo_heads: num_kv_heads * group, num_kv_heads, head_dim }
}

/// How positions are treated, by the names of the kernels.
fn positions(head_dim: usize) -> [(&'static str, Positions); 4] {
    let rope = |pairing, rotary_dim| {
        Positions::Reassigned(Rope { theta: 5e5, pairing, rotary_dim, ..Default::default() })
    };
    [
        ("native", Positions::Native),
        ("halves", rope(RopePairing::HalfSplit, None)),
        ("neighbours", rope(RopePairing::Interleaved, None)),
        ("part", rope(RopePairing::HalfSplit, Some(head_dim / 2))),
    ]
}

/// Every instance: types, head dimensions, groups, positions, decoding and blocks.
fn cases(smoke: bool) -> Vec<Case> {
    let mut cases = Vec::new();
    let mut push = |name: String, spec: Spec| cases.push(Case { name, spec });
    for (dtype, type_name) in [(DType::F16, "f16"), (DType::Bf16, "bf16")] {
        for head_dim in [64, 96, 128, 256] {
            for group in [1, 4, 7, 8, 16] {
                let spec = short(heads(2, group, head_dim), dtype, 700, 1);
                push(format!("{type_name}_d{head_dim}_g{group}"), spec);
            }
            for (name, positions) in positions(head_dim) {
                for block_len in [2, 40] {
                    let mut spec = short(heads(2, 4, head_dim), dtype, 600, block_len);
                    spec.config.positions = positions.clone();
                    spec.config.vote_pool_window = 5;
                    spec.rows = 2;
                    push(format!("{type_name}_d{head_dim}_{name}_t{block_len}"), spec);
                }
            }
            for group in [4, 8, 16] {
                let tokens = if smoke { 900 } else { STREAMED_BYTES / (8 * head_dim * 2) };
                let spec = short(heads(8, group, head_dim), dtype, tokens, 1);
                push(format!("{type_name}_d{head_dim}_g{group}_streamed"), spec);
            }
        }
    }
    let mut page = short(HEADS, DType::Bf16, 1003, 1);
    page.page_size = 1;
    page.config.logits_soft_cap = Some(5.0);
    push("bf16_page1_softcap".into(), page);
    if !smoke {
        push("bf16_beyond_clusters".into(), short(heads(1, 4, 64), DType::Bf16, BEYOND_CLUSTERS, 1));
    }
    cases
}

/// Runs one operation and prints the fingerprints of what it may have written.
fn print(case: &str, layer: &mut Layer<'_>, op: &str, done: tokenselect::Result<()>) -> Result<(), Error> {
    if let Err(error) = done {
        println!("{case} {op}: {error}");
        return Ok(());
    }
    let space = layer.select.workspace();
    let buffers: &[(&str, &Tensor)] = match op {
        "append" => &[],
        "pool" => &[("queries", space.buffer(Buffer::Queries)), ("actions", space.buffer(Buffer::Actions))],
        "score" => &[("logits", space.buffer(Buffer::Logits)), ("stats", space.buffer(Buffer::Stats))],
        "vote" => &[("votes", space.buffer(Buffer::Votes))],
        "top_k" | "select" | "append_select" | "reuse" => &[
            ("selected", space.buffer(Buffer::Selected)),
            ("selected_len", space.buffer(Buffer::SelectedLen)),
            ("votes", space.buffer(Buffer::Votes)),
            ("similarities", space.buffer(Buffer::Similarities)),
        ],
        _ => &[("out", layer.out()), ("lse", layer.lse())],
    };
    let mut line = format!("{case} {op}:");
    for (name, tensor) in buffers {
        line += &format!(" {name} {:016x}", Hash::of_tensor(tensor)?.0);
    }
    println!("{line}");
    Ok(())
}

type Operation = fn(&mut Layer<'_>) -> tokenselect::Result<()>;

const OPERATIONS: [(&str, Operation); 12] = [
    ("append", |layer| layer.append()),
    ("pool", |layer| layer.pool()),
    ("score", |layer| layer.score()),
    ("vote", |layer| layer.vote()),
    ("top_k", |layer| layer.top_k()),
    ("select", |layer| layer.select(false)),
    ("attend", |layer| layer.attend()),
    ("attend_dense", |layer| layer.attend_dense()),
    ("append_select", |layer| layer.append_select(true)),
    ("reuse", |layer| layer.append_select(true)),
    ("step", |layer| layer.step(Step::Anew)),
    ("merge", |layer| layer.merge()),
];

fn run(device: &Device, pools: &mut Pools, case: &Case) -> Result<(), Error> {
    let layer = &mut Layer::new(device, pools, &case.spec)?;
    for (name, operation) in OPERATIONS {
        layer.clear_output()?;
        let done = operation(layer);
        print(&case.name, layer, name, done)?;
    }
    Ok(())
}

fn main() -> Result<(), Error> {
    let options = Options::parse()?;
    let Some(device) = common::gpu(options.smoke) else { return Ok(()) };
    let cases = cases(options.smoke);
    let largest = cases.iter().map(|case| case.spec.num_elements()).max().ok_or("no cases")?;
    let mut pools = Pools::new(&device, largest)?;
    for case in &cases {
        if options.only.as_deref().is_none_or(|only| case.name.contains(only)) {
            run(&device, &mut pools, case)?;
        }
    }
    Ok(())
}
