//! Every operation of a layer and its whole steps on a GPU: median device time with a cold L2, against the time in which
//! the device's memory could deliver the bytes that must be moved.
//!
//! `kernels [--quick] [--only NAME] [--smoke] [--warm] [CSV FILE]`; `cargo bench --bench kernels --` goes before it, or the built
//! binary runs on its own. Bytes are the inputs read once and the outputs written once ([`common::Spec::bytes`]); the floor
//! takes the larger of the bandwidths measured for reading and for copying. `--only` takes a part of a name; `--warm` leaves the
//! L2 as the run before has left it. `--smoke` runs
//! everything once over short contexts in the emulator, to test this program. The environment variable
//! `TOKENSELECT_COMMIT` goes into the CSV's first line.

mod common;

use std::fs::File;
use std::io::Write;
use std::time::Duration;

use common::timer::Timer;
use common::{HEADS, Layer, Pools, Spec, Step, random};
use tokenselect::{Device, HeadShape};

/// What the bandwidths are measured over.
const BANDWIDTH_BYTES: usize = 2 << 30;
const K: usize = 1 << 10;

type Error = Box<dyn std::error::Error>;

struct Options {
    quick: bool,
    smoke: bool,
    warm: bool,
    only: Option<String>,
    csv: Option<String>,
}

impl Options {
    fn parse() -> Result<Self, Error> {
        let mut options = Options { quick: false, smoke: false, warm: false, only: None, csv: None };
        let mut args = std::env::args().skip(1);
        while let Some(arg) = args.next() {
            match arg.as_str() {
                "--quick" => options.quick = true,
                "--smoke" => options.smoke = true,
                "--warm" => options.warm = true,
                "--bench" => {} // from cargo
                "--only" => options.only = Some(args.next().ok_or("--only needs a part of a name")?),
                name if name.ends_with(".csv") => options.csv = Some(arg),
                _ => return Err(format!("unknown argument `{arg}`").into()),
            }
        }
        Ok(options)
    }
}

/// Measures, prints and records.
struct Table {
    timer: Timer,
    repeats: usize,
    only: Option<String>,
    /// Bytes per second.
    bandwidth: f64,
    csv: Option<File>,
    failures: usize,
}

impl Table {
    fn wants(&self, what: &str) -> bool {
        self.only.as_deref().is_none_or(|only| what.contains(only))
    }

    fn wants_any(&self, names: &[&str]) -> bool {
        names.iter().any(|what| self.wants(what))
    }

    /// Times `work`, each run after one of `before`.
    fn measure_after<'l>(
        &mut self,
        layer: &mut Layer<'l>,
        what: &str,
        bytes: usize,
        before: fn(&mut Layer<'l>) -> tokenselect::Result<()>,
        work: &mut dyn FnMut(&mut Layer<'l>) -> tokenselect::Result<()>,
    ) -> Result<(), Error> {
        if !self.wants(what) {
            return Ok(());
        }
        let mut sample = |timer: &mut Timer| {
            before(layer)?;
            timer.once(&mut || work(layer))
        };
        // The first run may load code.
        let time = sample(&mut self.timer).and_then(|_| self.timer.median(self.repeats, sample));
        let spec = &layer.spec;
        match time {
            Ok(time) => self.record(spec, what, bytes, time),
            Err(error) => {
                self.fail(spec, what, &error.to_string());
                Ok(())
            }
        }
    }

    fn measure<'l>(
        &mut self,
        layer: &mut Layer<'l>,
        what: &str,
        bytes: usize,
        mut work: impl FnMut(&mut Layer<'l>) -> tokenselect::Result<()>,
    ) -> Result<(), Error> {
        self.measure_after(layer, what, bytes, |_| Ok(()), &mut work)
    }

    fn record(&mut self, spec: &Spec, what: &str, bytes: usize, time: Duration) -> Result<(), Error> {
        let (us, floor) = (time.as_secs_f64() * 1e6, bytes as f64 / self.bandwidth * 1e6);
        let (tokens, page_size, rows) = (spec.tokens, spec.page_size, spec.rows);
        let rate = bytes as f64 / us / 1e3;
        let percent = 100.0 * floor / us;
        println!(
            "{what:>24} {tokens:>8} {page_size:>4} {rows:>4} {us:>10.1} {floor:>9.1} {rate:>8.0} {percent:>7.0}%"
        );
        if let Some(csv) = &mut self.csv {
            writeln!(csv, "{what},{tokens},{page_size},{rows},{us:.2},{bytes},{floor:.2}")?;
        }
        Ok(())
    }

    fn fail(&mut self, spec: &Spec, what: &str, reason: &str) {
        self.failures += 1;
        println!("{what:>24} {:>8} {:>4} {:>4} FAILED: {reason}", spec.tokens, spec.page_size, spec.rows);
    }

    /// The operations of a decode step one by one, after a selection.
    fn operations(&mut self, layer: &mut Layer<'_>) -> Result<(), Error> {
        let bytes = layer.spec.bytes();
        self.measure(layer, "append", bytes.append, Layer::append)?;
        self.measure(layer, "pool", bytes.pool, Layer::pool)?;
        self.measure(layer, "score", bytes.score, Layer::score)?;
        self.measure(layer, "vote", bytes.vote, Layer::vote)?;
        self.measure_after(layer, "top_k", bytes.top_k, Layer::vote, &mut Layer::top_k)?;
        self.measure(layer, "vote+top_k", bytes.vote_top_k, Layer::vote_top_k)?;
        self.measure(layer, "select", bytes.select, |layer| layer.select(false))?;
        self.measure(layer, "attend", bytes.attend, Layer::attend)?;
        self.measure(layer, "dense_decode", bytes.dense, Layer::attend_dense)
    }

    /// A whole step, launched one by one and as a graph; the two must give the same bits.
    fn step(&mut self, device: &Device, layer: &mut Layer<'_>, what: &str, step: Step) -> Result<(), Error> {
        let graph_name = format!("{what}_graph");
        if !self.wants(what) && !self.wants(&graph_name) {
            return Ok(());
        }
        let bytes = layer.spec.bytes();
        let bytes = match step {
            Step::Anew => bytes.step_anew,
            Step::Reused => bytes.step_reused,
            Step::Dense => bytes.step_dense,
        };
        layer.clear_output()?;
        layer.step(step)?;
        let eager = layer.output()?;
        if step == Step::Anew
            && let Err(reason) = layer.check_lists()
        {
            self.fail(&layer.spec.clone(), what, &reason);
        }
        if eager.iter().any(|x| !x.is_finite()) || eager.iter().all(|x| x.to_f32() == 0.0) {
            self.fail(&layer.spec.clone(), what, "the output is not finite, or all zeros");
        }
        self.measure(layer, what, bytes, |layer| layer.step(step))?;

        let graph = device.capture(|| layer.step(step))?;
        layer.clear_output()?;
        // SAFETY: `layer` is alive, and none of its tensors is ever replaced.
        unsafe { graph.launch()? };
        let replayed = layer.output()?;
        if eager != replayed {
            self.fail(&layer.spec.clone(), &graph_name, "the graph gives another output");
        }
        // SAFETY: as above.
        self.measure(layer, &graph_name, bytes, |_| unsafe { graph.launch() })
    }

    /// The three kinds of decode step.
    fn steps(&mut self, device: &Device, layer: &mut Layer<'_>) -> Result<(), Error> {
        self.step(device, layer, "step_anew", Step::Anew)?;
        layer.select(true)?; // the selection that the next steps use
        let before = layer.stats()?;
        self.step(device, layer, "step_reused", Step::Reused)?;
        let after = layer.stats()?;
        if after.scored != before.scored {
            self.fail(&layer.spec.clone(), "step_reused", "a step selected anew");
        }
        self.step(device, layer, "step_dense", Step::Dense)
    }
}

/// Contexts and page sizes.
struct Sizes {
    /// Tokens and page size of what is measured in full.
    full: Vec<(usize, usize)>,
    /// Tokens for the linearity of `score` and `select`.
    linear: Vec<usize>,
    /// Rows and tokens of each.
    batch: Option<(usize, usize)>,
    /// Tokens for other heads.
    shapes: Option<usize>,
    /// Query tokens of a prefill chunk.
    chunk: usize,
    /// Query tokens of pieces of a prompt, and of their blocks.
    pieces: Vec<(usize, usize)>,
}

impl Sizes {
    fn of(options: &Options) -> Self {
        if options.smoke {
            let full = vec![(700, 16), (700, 1)];
            return Sizes {
                full,
                linear: vec![800],
                batch: Some((3, 500)),
                shapes: Some(600),
                chunk: 40,
                pieces: vec![(90, 10)],
            };
        }
        if options.quick {
            let full = vec![(32 * K, 16), (K * K, 16)];
            return Sizes {
                full,
                linear: Vec::new(),
                batch: None,
                shapes: None,
                chunk: 512,
                pieces: vec![(8 * K, 512)],
            };
        }
        Sizes {
            full: [32 * K, 128 * K, K * K].into_iter().flat_map(|n| [(n, 16), (n, 1)]).collect(),
            linear: vec![256 * K, 512 * K, 2 * K * K],
            batch: Some((16, 32 * K)),
            shapes: Some(512 * K),
            chunk: 512,
            pieces: vec![(8 * K, 512), (8 * K, 64), (K, 16), (K, 8)],
        }
    }
}

/// Lists short enough for the emulator.
fn shrink(mut spec: Spec, smoke: bool) -> Spec {
    if smoke {
        spec.config.n_init = 16;
        spec.config.n_local = 64usize.saturating_sub(spec.block_len);
        spec.config.top_k = 100;
    }
    spec
}

fn driver_version() -> String {
    let text = std::fs::read_to_string("/sys/module/nvidia/version").ok().or_else(|| {
        let args = ["--query-gpu=driver_version", "--format=csv,noheader", "--id=0"];
        let output = std::process::Command::new("nvidia-smi").args(args).output().ok()?;
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
    });
    text.map_or_else(
        || {
            cust::CudaApiVersion::get()
                .map_or("unknown".into(), |v| format!("for CUDA {}.{}", v.major(), v.minor()))
        },
        |text| text.trim().to_owned(),
    )
}

/// What a measurement needs beside its specification.
struct Bench<'a> {
    device: &'a Device,
    pools: &'a mut Pools,
    table: &'a mut Table,
}

impl Bench<'_> {
    /// Selects, and says so if the lists are wrong.
    fn layer<'l>(
        device: &Device,
        pools: &'l mut Pools,
        table: &mut Table,
        spec: &Spec,
    ) -> Result<Layer<'l>, Error> {
        let mut layer = Layer::new(device, pools, spec)?;
        layer.select(false)?;
        if let Err(reason) = layer.check_lists() {
            table.fail(spec, "select", &reason);
        }
        Ok(layer)
    }

    /// Every operation and step of a decode row.
    fn decode(&mut self, spec: &Spec) -> Result<(), Error> {
        let mut layer = Bench::layer(self.device, self.pools, self.table, spec)?;
        self.table.operations(&mut layer)?;
        self.table.steps(self.device, &mut layer)
    }

    /// What reassigned positions change.
    fn reassigned(&mut self, spec: &Spec) -> Result<(), Error> {
        if !self.table.wants_any(&["attend_reassigned", "step_anew_reassigned", "step_anew_reassigned_graph"])
        {
            return Ok(());
        }
        let mut layer = Bench::layer(self.device, self.pools, self.table, spec)?;
        self.table.measure(&mut layer, "attend_reassigned", spec.bytes().attend, Layer::attend)?;
        self.table.step(self.device, &mut layer, "step_anew_reassigned", Step::Anew)
    }

    /// A chunk of prefill.
    fn prefill(&mut self, spec: &Spec, suffix: &str) -> Result<(), Error> {
        let (attend, step) = (format!("prefill_attend{suffix}"), format!("prefill_step{suffix}"));
        if !self.table.wants_any(&[&attend, &step]) {
            return Ok(());
        }
        let mut layer = Bench::layer(self.device, self.pools, self.table, spec)?;
        let bytes = spec.bytes();
        self.table.measure(&mut layer, &attend, bytes.attend, Layer::attend)?;
        self.table.measure(&mut layer, &step, bytes.step_anew, |layer| layer.step(Step::Anew))
    }

    /// A piece of a prompt in blocks.
    fn piece(&mut self, spec: &Spec) -> Result<(), Error> {
        let len = spec.cut.unwrap_or(spec.block_len);
        let [select, attend, step] = ["select", "attend", "step"].map(|what| format!("piece_{what}_{len}"));
        if !self.table.wants_any(&[&select, &attend, &step]) {
            return Ok(());
        }
        let mut layer = Bench::layer(self.device, self.pools, self.table, spec)?;
        let bytes = spec.bytes();
        self.table.measure(&mut layer, &select, bytes.select, |layer| layer.select(false))?;
        self.table.measure(&mut layer, &attend, bytes.attend, Layer::attend)?;
        self.table.measure(&mut layer, &step, bytes.step_anew, |layer| layer.step(Step::Anew))
    }

    /// How selection grows with the context.
    fn linear(&mut self, spec: &Spec) -> Result<(), Error> {
        if !self.table.wants_any(&["score", "select"]) {
            return Ok(());
        }
        let mut layer = Bench::layer(self.device, self.pools, self.table, spec)?;
        let bytes = spec.bytes();
        self.table.measure(&mut layer, "score", bytes.score, Layer::score)?;
        self.table.measure(&mut layer, "select", bytes.select, |layer| layer.select(false))
    }

    /// Steps of many rows.
    fn batch(&mut self, spec: &Spec) -> Result<(), Error> {
        let mut layer = Bench::layer(self.device, self.pools, self.table, spec)?;
        self.table.steps(self.device, &mut layer)
    }

    /// Heads of another shape.
    fn shape(&mut self, spec: &Spec, name: &str) -> Result<(), Error> {
        let [score, attend, dense] = ["score", "attend", "dense_decode"].map(|what| format!("{what}_{name}"));
        if !self.table.wants_any(&[&score, &attend, &dense]) {
            return Ok(());
        }
        let mut layer = Bench::layer(self.device, self.pools, self.table, spec)?;
        self.table.measure(&mut layer, &score, spec.bytes().score, Layer::score)?;
        self.table.measure(&mut layer, &attend, spec.bytes().attend, Layer::attend)?;
        self.table.measure(&mut layer, &dense, spec.bytes().dense, Layer::attend_dense)
    }

    /// Does one of the above; what fails does not end the rest.
    fn attempt(&mut self, spec: &Spec, what: impl FnOnce(&mut Self, &Spec) -> Result<(), Error>) {
        if let Err(error) = what(self, spec) {
            self.table.fail(spec, "the rest", &error.to_string());
        }
    }
}

/// Heads beside those of [`HEADS`].
const SHAPES: [(&str, HeadShape); 5] = [
    ("d256", HeadShape { num_qo_heads: 16, head_dim: 256, ..HEADS }),
    ("d64", HeadShape { head_dim: 64, ..HEADS }),
    ("g1", HeadShape { num_qo_heads: 8, ..HEADS }),
    ("g7", HeadShape { num_qo_heads: 28, num_kv_heads: 4, ..HEADS }),
    ("g8", HeadShape { num_kv_heads: 4, ..HEADS }),
];

fn run(device: &Device, options: &Options, table: &mut Table) -> Result<(), Error> {
    let sizes = Sizes::of(options);
    let decode = |tokens, page_size| Spec { page_size, ..shrink(Spec::decode(tokens), options.smoke) };
    let chunk =
        |tokens, page_size| Spec { page_size, ..shrink(Spec::prefill(tokens, sizes.chunk), options.smoke) };
    let full: Vec<Spec> = sizes.full.iter().map(|&(tokens, page_size)| decode(tokens, page_size)).collect();
    let linear: Vec<Spec> = sizes.linear.iter().map(|&tokens| decode(tokens, 16)).collect();
    let batch = sizes.batch.map(|(rows, tokens)| Spec { rows, ..decode(tokens, 16) });
    let mut shapes = Vec::new();
    for (name, heads) in SHAPES {
        let Some(tokens) = sizes.shapes else { continue };
        let (mut rows, mut blocks) = (decode(tokens, 16), chunk(tokens, 16));
        (rows.config.heads, blocks.config.heads) = (heads, heads);
        shapes.push((name, rows, blocks));
    }
    let of_shapes = shapes.iter().flat_map(|(_, rows, blocks)| [rows, blocks]);
    let largest = full.iter().chain(&linear).chain(&batch).chain(of_shapes).map(Spec::num_elements).max();
    let mut pools = Pools::new(device, largest.ok_or("nothing to do")?)?;
    let mut bench = Bench { device, pools: &mut pools, table };

    for spec in &full {
        bench.attempt(spec, Bench::decode);
        bench.attempt(&spec.clone().reassigned(), Bench::reassigned);
        let chunk = chunk(spec.tokens, spec.page_size);
        bench.attempt(&chunk, |bench, spec| bench.prefill(spec, ""));
        bench.attempt(&chunk.reassigned(), |bench, spec| bench.prefill(spec, "_reassigned"));
    }
    for &(tokens, page_size) in &sizes.full {
        for &(piece, cut) in &sizes.pieces {
            let spec = shrink(Spec { page_size, ..Spec::piece(tokens, piece, cut) }, options.smoke);
            bench.attempt(&spec, Bench::piece);
        }
    }
    for spec in &linear {
        bench.attempt(spec, Bench::linear);
    }
    if let Some(spec) = &batch {
        bench.attempt(spec, Bench::batch);
    }
    for (name, rows, blocks) in shapes {
        bench.attempt(&rows, |bench, spec| bench.shape(spec, name));
        bench.attempt(&blocks, |bench, spec| bench.prefill(spec, &format!("_{name}")));
        let suffix = format!("_{name}_reassigned");
        bench.attempt(&blocks.reassigned(), |bench, spec| bench.prefill(spec, &suffix));
    }
    Ok(())
}

fn main() -> Result<(), Error> {
    let options = Options::parse()?;
    let Some(device) = common::gpu(options.smoke) else { return Ok(()) };
    let begin = std::time::Instant::now();
    let mut timer = Timer::new(&device)?;
    let (mut copy, mut read) = (1e12, 1e12);
    if !options.smoke {
        let from = random(&device, BANDWIDTH_BYTES / 2, 6)?;
        copy = timer.copy_bandwidth(&from)?;
        read = timer.read_bandwidth(&from)?;
    }
    let [copied, read_at] = [copy, read].map(|rate| format!("{:.2} TB/s", rate / 1e12));
    let bandwidths = format!("copy {copied} (read and written), read {read_at}, the larger for floors");
    let commit = std::env::var("TOKENSELECT_COMMIT").unwrap_or("unknown".into());
    let device_line = format!("{}, driver {}, commit {commit}", device.name(), driver_version());
    println!("{device_line}\n{bandwidths}");
    println!("kernels loaded in {:.0} ms", device.load_time().as_secs_f64() * 1e3);

    let repeats = if options.smoke { 1 } else { 21 };
    let mut csv = options.csv.as_ref().map(File::create).transpose()?;
    let l2 = if options.warm { "left as it was" } else { "flushed by reading" };
    if let Some(csv) = &mut csv {
        writeln!(csv, "# {device_line}; {bandwidths}; medians of {repeats}, L2 {l2} before each run")?;
        writeln!(csv, "what,tokens,page_size,rows,us,bytes,floor_us")?;
    }
    println!(
        "{:>24} {:>8} {:>4} {:>4} {:>10} {:>9} {:>8} {:>8}",
        "what", "tokens", "page", "rows", "us", "floor us", "GB/s", "of floor"
    );
    let bandwidth = copy.max(read);
    timer.warm = options.warm;
    let mut table = Table { timer, repeats, only: options.only.clone(), bandwidth, csv, failures: 0 };
    run(&device, &options, &mut table)?;
    println!("{:.1} s in all", begin.elapsed().as_secs_f64());
    if table.failures > 0 {
        return Err(format!("{} checks or measurements failed", table.failures).into());
    }
    Ok(())
}
