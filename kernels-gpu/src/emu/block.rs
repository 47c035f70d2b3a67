//! One running block: its lanes, who may run next, and what they report.
//!
//! The block being run is reached through a thread-local pointer ([`with`]), in short borrows that never span a switch.
//! Coroutines stay on the OS thread that started them, so the pointer a lane sees is always its own block's.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, Location, catch_unwind, resume_unwind};
use std::ptr;

use corosensei::{Coroutine, CoroutineResult, Yielder};

use super::atomics::BlockOrder;
use super::barrier::Barrier;
use super::bulk::MBarrier;
use super::cluster::Member;
use super::copies::{Copies, UnderWay};
use super::global_race::GlobalRaces;
use super::launch::Stats;
use super::memory::Memory;
use super::options::{Options, Order};
use super::overlap::Running;
use super::race::Shadow;
use super::report::{Fault, Kind, Site, lanes};
use super::stack::LaneStack;
use super::warp::{Op, Pending};
use super::warpgroup::{OperandUnderWay, Products};
use crate::launch::Dims;

/// Why a lane does not run.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Wait {
    Nothing,
    Warp { op: Op, mask: u32 },
    Barrier { id: u32, threads: u32 },
    MBarrier { index: usize, parity: u32 },
    Cluster,
    Ended,
}

/// What switches and collectives touch.
pub(crate) struct Lane {
    yielder: *const Yielder<(), ()>,
    pub site: Site,
    pub wait: Wait,
    /// Arguments of a collective on the way in, results on the way out.
    pub words: [u32; 12],
}

/// A unit of shared memory: bulk copies want 128-byte alignment.
#[derive(Clone, Copy)]
#[repr(C, align(128))]
pub(crate) struct Line([u8; 128]);

/// Accesses to memory that a lane may make before it lets others go first.
const ACCESSES_AT_A_TIME: u32 = 1 << 14;

/// What fresh shared memory holds: NaN as f32, f16 and bf16.
const POISON: Line = Line([0xff; 128]);

/// What all blocks of a launch share.
#[derive(Clone, Copy)]
pub(crate) struct Launched {
    pub memory: *const Memory,
    /// The shadow of global memory; null: none.
    pub global_races: *const GlobalRaces,
    /// The place among launches that overlap; null: they do not.
    pub running: *const Running,
}

const NOTHING: Launched = Launched { memory: ptr::null(), global_races: ptr::null(), running: ptr::null() };

/// The state of the block that an OS thread runs; reused for block after block, launch after launch.
pub(crate) struct Block {
    pub dims: Dims,
    pub options: Options,
    pub index: [u32; 3],
    launched: Launched,
    pub order: BlockOrder,

    pub current: usize,
    pub lanes: Vec<Lane>,
    pub copies: Vec<Copies>,
    /// Per lane, its tensor-core products under way; and the warps and bytes of the operands that these read.
    pub products: Vec<Products>,
    pub operands_under_way: Vec<OperandUnderWay>,
    pub under_way: UnderWay,
    pub pending: Vec<Vec<Pending>>,
    pub barriers: [Barrier; 16],
    /// Barriers in shared memory, in the order they were made in.
    pub mbarriers: Vec<MBarrier>,
    pub shared: Vec<Line>,
    pub shadow: Shadow,
    pub cluster: Member,
    pub stats: Stats,

    /// Per warp, the lanes that could run.
    ready: Vec<u32>,
    leave_warp: bool,
    random_state: u64,
    /// Switches and accesses that are left of the budget, and accesses until the lane that runs lets others go first.
    budget_left: u64,
    accesses_left: u32,
}

thread_local! {
    static CURRENT: Cell<*mut Block> = const { Cell::new(ptr::null_mut()) };
}

/// A short exclusive borrow of the running block; `f` must not suspend.
#[inline(always)]
pub(crate) fn with<R>(f: impl FnOnce(&mut Block) -> R) -> R {
    let block = CURRENT.get();
    assert!(!block.is_null(), "a device primitive was called outside an emulated launch");
    // SAFETY: set by `run` for as long as it runs on this OS thread. The only other borrows are those of other
    // calls of `with`, and they have ended: `f` neither suspends nor calls kernel code.
    f(unsafe { &mut *block })
}

/// Gives control back to the scheduler, until this lane is picked again.
#[inline(always)]
pub(crate) fn suspend() {
    let yielder = with(|block| block.lanes[block.current].yielder);
    // SAFETY: the yielder lives on this lane's own stack, in the frame that called the kernel.
    unsafe { (*yielder).suspend(()) }
}

/// Runs the prepared blocks of a cluster to their end, in turn. An error says which block failed, and how.
pub(crate) fn run(
    blocks: &mut [Box<Block>],
    stacks: &mut [LaneStack],
    kernel: &(dyn Fn() + Sync),
) -> Result<(), (usize, Fault)> {
    let body = |yielder: &Yielder<(), ()>, ()| {
        with(|block| {
            let lane = block.current;
            block.lanes[lane].yielder = yielder;
        });
        kernel()
    };
    let threads = blocks[0].lanes.len();
    let mut coroutines: Vec<Coroutine<(), (), (), &mut LaneStack>> = stacks[..blocks.len() * threads]
        .iter_mut()
        // SAFETY: `body` borrows `kernel`; every coroutine has ended or been reset before this function returns.
        .map(|stack| unsafe { Coroutine::with_stack_unchecked(stack, body) })
        .collect();
    let outer = CURRENT.get();
    let mut running = 0;
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        let mut idle = 0;
        while idle < blocks.len() {
            let of_block = &mut coroutines[running * threads..][..threads];
            idle = if blocks[running].run_lanes(of_block) { 0 } else { idle + 1 };
            running = (running + 1) % blocks.len();
        }
    }));
    CURRENT.set(outer);
    for coroutine in coroutines.iter_mut().filter(|c| c.started() && !c.done()) {
        // SAFETY: kernels own nothing that must be dropped; a test closure that does leaks it on a fault.
        unsafe { coroutine.force_reset() }
    }
    if let Err(payload) = outcome {
        let fault = payload.downcast::<Fault>().map_or_else(
            |panic| Fault { kind: Kind::Panic, message: blocks[running].describe_panic(&*panic) },
            |fault| *fault,
        );
        return Err((running, fault));
    }
    blocks.iter().enumerate().try_for_each(|(rank, block)| block.check_end().map_err(|fault| (rank, fault)))
}

impl Block {
    pub fn new() -> Block {
        Block {
            dims: Dims::linear(1, 32, 0),
            options: Options::default(),
            index: [0; 3],
            launched: NOTHING,
            order: BlockOrder::default(),
            current: 0,
            lanes: Vec::new(),
            copies: Vec::new(),
            products: Vec::new(),
            operands_under_way: Vec::new(),
            under_way: UnderWay::default(),
            pending: Vec::new(),
            barriers: Default::default(),
            mbarriers: Vec::new(),
            shared: Vec::new(),
            shadow: Shadow::default(),
            cluster: Member::default(),
            stats: Stats::default(),
            ready: Vec::new(),
            leave_warp: false,
            random_state: 1,
            budget_left: 0,
            accesses_left: 0,
        }
    }

    /// Prepares for block number `linear` of a launch, in a cluster of `blocks`.
    ///
    /// # Safety
    /// What `launched` points to outlives the following [`run`].
    pub unsafe fn begin(
        &mut self,
        dims: Dims,
        options: Options,
        launched: Launched,
        linear: u64,
        blocks: &[*mut Block],
    ) {
        let threads = dims.num_threads() as usize;
        let [x, y, _] = dims.grid.map(u64::from);
        self.index = [(linear % x) as u32, (linear / x % y) as u32, (linear / x / y) as u32];
        (self.dims, self.options, self.launched) = (dims, options, launched);
        self.order = BlockOrder::new(linear as u32);
        self.current = 0;
        let here = Location::caller();
        self.lanes.clear();
        self.lanes.extend((0..threads).map(|_| Lane {
            yielder: ptr::null(),
            site: here,
            wait: Wait::Nothing,
            words: [0; 12],
        }));
        self.copies.resize_with(threads, Copies::default);
        self.copies.iter_mut().for_each(Copies::clear);
        self.products.clear();
        self.products.resize_with(threads, Products::default);
        self.operands_under_way.clear();
        self.under_way = UnderWay::default();
        self.pending.resize_with(threads / 32, Vec::new);
        self.pending.iter_mut().for_each(Vec::clear);
        self.barriers = Default::default();
        self.mbarriers.clear();
        self.shared.clear();
        self.shared.resize((dims.shared_bytes as usize).div_ceil(128), POISON);
        self.shadow.reset(dims.shared_bytes as usize, threads);
        self.cluster.reset(dims.shared_bytes as usize, blocks);
        self.ready.clear();
        self.ready.resize(threads / 32, u32::MAX);
        self.leave_warp = false;
        let seed = if let Order::Random(seed) = options.order { seed } else { 0 };
        self.random_state = (seed ^ linear.rotate_left(32)).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        (self.budget_left, self.accesses_left) = (options.budget, ACCESSES_AT_A_TIME);
    }

    pub fn memory(&self) -> &Memory {
        // SAFETY: `begin`'s contract.
        unsafe { &*self.launched.memory }
    }

    /// The shadow of global memory, if this launch keeps one.
    pub fn global_races(&self) -> Option<&GlobalRaces> {
        // SAFETY: `begin`'s contract.
        unsafe { self.launched.global_races.as_ref() }
    }

    /// The launch's place among those that overlap, if they do.
    #[inline]
    pub fn running(&self) -> Option<&Running> {
        // SAFETY: `begin`'s contract.
        unsafe { self.launched.running.as_ref() }
    }

    pub fn thread_idx(&self, axis: usize) -> u32 {
        self.thread_index(self.current)[axis]
    }

    fn thread_index(&self, thread: usize) -> [u32; 3] {
        let [x, y, _] = self.dims.block;
        let thread = thread as u32;
        [thread % x, thread / x % y, thread / x / y]
    }

    /// Ends the launch with a fault of the running lane.
    #[cold]
    #[inline(never)]
    pub fn fail(&self, kind: Kind, what: String, site: Site) -> ! {
        let message = format!("{}: {what}, at {site}", self.describe(self.current));
        // `resume_unwind` and not `panic!`: the report says it all, the panic hook need not.
        resume_unwind(Box::new(Fault { kind, message }))
    }

    /// `warp 0 lane 3 (thread [3, 0, 0])`.
    pub fn describe(&self, thread: usize) -> String {
        format!("warp {} lane {} (thread {:?})", thread / 32, thread % 32, self.thread_index(thread))
    }

    /// Marks the running lane as one that could go on, and lets others go first.
    pub fn requeue(&mut self) {
        self.ready[self.current / 32] |= 1 << (self.current % 32);
        self.leave_warp = true;
    }

    /// Makes lanes of a warp runnable.
    #[inline]
    pub fn wake(&mut self, warp: usize, mask: u32) {
        self.ready[warp] |= mask;
    }

    pub fn is_random(&self) -> bool {
        matches!(self.options.order, Order::Random(_))
    }

    /// The next draw of the schedule (xorshift64; its high bits are the better ones).
    pub fn random(&mut self, below: u32) -> u32 {
        self.random_state ^= self.random_state << 13;
        self.random_state ^= self.random_state >> 7;
        self.random_state ^= self.random_state << 17;
        (((self.random_state >> 32) * below as u64) >> 32) as u32
    }

    /// The lane to run next. A warp goes on while it can: the stacks of 32 lanes fit into L1, those of a block do not.
    fn pick(&mut self) -> Option<usize> {
        let warps = self.ready.len();
        let mut warp = self.current / 32;
        if self.is_random() {
            warp = self.random(warps as u32) as usize;
        } else if self.leave_warp {
            warp = (warp + 1) % warps;
            self.leave_warp = false;
        }
        let warp = (warp..warps).chain(0..warp).find(|&w| self.ready[w] != 0)?;
        let ready = self.ready[warp];
        let lane = match self.options.order {
            Order::Forward => ready.trailing_zeros(),
            Order::Reverse => 31 - ready.leading_zeros(),
            Order::Random(_) => {
                let first = self.random(32);
                (ready.rotate_right(first).trailing_zeros() + first) % 32
            }
        };
        self.ready[warp] &= !(1 << lane);
        self.spend(1 + (ACCESSES_AT_A_TIME - self.accesses_left) as u64);
        self.accesses_left = ACCESSES_AT_A_TIME;
        self.stats.switches += 1;
        self.current = warp * 32 + lane as usize;
        Some(self.current)
    }

    /// Takes so much from the budget.
    fn spend(&mut self, steps: u64) {
        if self.budget_left < steps {
            let text = "switches and accesses to memory: a livelock";
            let message = format!("still running after {} {text}", self.options.budget);
            resume_unwind(Box::new(Fault { kind: Kind::Deadlock, message }));
        }
        self.budget_left -= steps;
    }

    /// Counts an access of the running lane; true if it has had so many in a row that it should let others go first, who
    /// may do what it waits for.
    #[inline(always)]
    pub fn tires(&mut self) -> bool {
        self.accesses_left -= 1;
        if self.accesses_left > 0 {
            return false;
        }
        self.requeue();
        true
    }

    /// Runs lanes until none can go on; false if none could. A random schedule leaves the block now and then.
    fn run_lanes(&mut self, coroutines: &mut [Coroutine<(), (), (), &mut LaneStack>]) -> bool {
        CURRENT.set(self);
        let mut ran = false;
        while let Some(lane) = with(Block::pick) {
            ran = true;
            if let CoroutineResult::Return(()) = coroutines[lane].resume(()) {
                with(|block| block.lanes[lane].wait = Wait::Ended);
            }
            if with(|block| !block.cluster.blocks.is_empty() && block.is_random() && block.random(64) == 0) {
                break;
            }
        }
        ran
    }

    /// What is wrong with a block that does not go on.
    fn check_end(&self) -> Result<(), Fault> {
        if !self.lanes.iter().all(|lane| lane.wait == Wait::Ended) {
            return Err(Fault { kind: Kind::Deadlock, message: self.describe_deadlock() });
        }
        self.check_copies()?;
        self.check_waits()?;
        self.check_products()?;
        self.cluster.check_end()
    }

    fn describe_panic(&self, payload: &(dyn std::any::Any + Send)) -> String {
        let text = payload
            .downcast_ref::<String>()
            .map(String::as_str)
            .or_else(|| payload.downcast_ref::<&str>().copied())
            .unwrap_or("(no text)");
        format!("{}: panicked: {text}", self.describe(self.current))
    }

    /// Who is stuck, grouped by what they wait for and where.
    fn describe_deadlock(&self) -> String {
        let mut by_warp: BTreeMap<(usize, String), u32> = BTreeMap::new();
        for (thread, lane) in self.lanes.iter().enumerate() {
            let what = match lane.wait {
                Wait::Nothing => "could run".into(),
                Wait::Ended => "ended".into(),
                Wait::Warp { op, mask } => {
                    format!("wait in {op:?} with mask {mask:#010x} at {}", lane.site)
                }
                Wait::Barrier { id, threads } => {
                    let arrived = self.barriers[id as usize].arrived();
                    format!("wait at barrier {id} ({arrived} of {threads} arrived) at {}", lane.site)
                }
                Wait::Cluster => {
                    let (arrived, threads) = (self.cluster.arrived(), self.lanes.len());
                    format!(
                        "wait at the barrier of the cluster ({arrived} of {threads} of the block arrived) at {}",
                        lane.site
                    )
                }
                Wait::MBarrier { index, parity } => {
                    format!("{} at {}", self.describe_mbarrier(index, parity), lane.site)
                }
            };
            *by_warp.entry((thread / 32, what)).or_default() |= 1 << (thread % 32);
        }
        let mut alike: BTreeMap<(String, u32), Vec<usize>> = BTreeMap::new();
        for ((warp, what), mask) in by_warp {
            alike.entry((what, mask)).or_default().push(warp);
        }
        let mut text = String::from("no lane can run:");
        for ((what, mask), warps) in alike {
            text += &format!("\n    warps {warps:?} lanes {}: {what}", lanes(mask));
        }
        text
    }
}
