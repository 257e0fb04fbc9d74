//! One rank's end on the device: the kernels, their state, and the launches.

use std::time::Duration;

use waterfill_board::{Ended, Region, Shape as BoardShape};

use crate::args::{
    Args, COUNT, GIVEN, LIVE, MoveArgs, OWN, State, common_args, launch_of, launch_of_ids,
    launch_of_replicas, move_args, replica_args, weight_bits, with_board, with_cut,
};
use crate::compiler::{CHOOSE, Compiler, EXPAND, MOVE_UP};
use crate::driver::{
    CurrentContext, Device, DeviceCell, Kernel, Launch, OwnStream, RelaxedCapture, Stream, register,
};
use crate::error::{Error, Result};
use crate::shape::{Geometry, MAX_ROWS, MOST_THREADS, Shape, Variant};

/// Sizes of clusters to try, largest first; more than 8 blocks only some devices can.
const CLUSTERS: [usize; 2] = [16, 8];
/// The first architecture that has clusters.
const WITH_CLUSTERS: u32 = 90;

/// One rank's kernels and their state on one device. Its launches are for one stream at a time.
#[derive(Debug)]
pub struct Runner {
    state: DeviceCell<State>,
    /// That of the calls that choose replicas: those on the board, so a launch of given quotas behind one counts apart.
    pub(crate) replica_state: Option<DeviceCell<State>>,
    block: Kernels,
    move_up: Kernel,
    /// For calls of more rows than one block takes, where the device has clusters.
    cluster: Option<Cluster>,
    pub(crate) device: Device,
    pub(crate) has_board: bool,
    pub(crate) shape: Shape,
    pub(crate) shared_bytes: usize,
    /// What every call has in common.
    pub(crate) args: Args,
}

#[derive(Debug)]
pub(crate) struct Kernels {
    own_only: Kernel,
    any: Kernel,
    /// Where experts are redundant.
    pub choose: Option<Kernel>,
}

impl Kernels {
    /// Those that expand.
    fn expanding(&self) -> [&Kernel; 2] {
        [&self.own_only, &self.any]
    }

    fn all(&self) -> impl Iterator<Item = &Kernel> {
        self.expanding().into_iter().chain(&self.choose)
    }

    fn of(&self, mode: u32) -> &Kernel {
        if mode == OWN { &self.own_only } else { &self.any }
    }
}

#[derive(Debug)]
struct Cluster {
    kernels: Kernels,
    most_blocks: usize,
}

/// Where a call's quotas come from.
#[derive(Clone, Copy, Debug)]
pub enum Quotas {
    /// From the rank's own counts.
    Own,
    /// From the board's planner, if they come within `cap` after they are waited for; else own ones.
    Live {
        /// The longest wait.
        cap: Duration,
    },
    /// As [`Live`](Self::Live), over a board on which this rank posts what a collective brought from all.
    Gathered {
        /// The longest wait.
        cap: Duration,
        /// `[R, words]` 32-bit words on the device: what [`Runner::count`] wrote on each rank, in their order.
        address: u64,
    },
    /// `[R]` 32-bit words on the device; own ones if they do not add up to the tokens.
    Given {
        /// Their address.
        address: u64,
    },
}

/// One call: addresses on the device, and what is at them.
#[derive(Clone, Copy, Debug)]
pub struct Call {
    /// `[rows, top_k]` ids.
    pub ids: u64,
    /// `[rows, top_k]` weights.
    pub weights: u64,
    /// `[rows, top_k + 1]` ids.
    pub out_ids: u64,
    /// `[rows, top_k + 1]` weights.
    pub out_weights: u64,
    /// Rows.
    pub rows: usize,
    /// Weight of the shared expert's row.
    pub shared_weight: f32,
    /// One 32-bit integer: rows at or past it are padding. 0: there is none.
    pub unpadded: u64,
    /// Where the quotas come from.
    pub quotas: Quotas,
}

impl Runner {
    /// Compile (or find) the kernels, load them and run each once, so that no later launch has to.
    ///
    /// May be called while another thread captures a graph.
    ///
    /// # Errors
    /// A shape or rank that does not fit, no driver or NVRTC, or what they refuse.
    pub fn new(ordinal: usize, shape: Shape, rank: usize, compiler: &Compiler) -> Result<Self> {
        shape.check()?;
        waterfill_core::check_rank("rank", rank as i64, shape.ranks)?;
        let device = Device::new(ordinal)?;
        let current = device.current()?;
        let relaxed = RelaxedCapture::new()?;
        let architecture = device.architecture()?;
        let shared_bytes = device.shared_memory()?;
        let block = load(compiler, &shape, false, architecture, shared_bytes)?;
        let move_up = block.own_only.beside(MOVE_UP)?;
        let cluster = cluster(compiler, &shape, architecture, shared_bytes)?;
        let state = DeviceCell::new()?;
        let replica_state = (shape.redundant > 0).then(DeviceCell::new).transpose()?;
        let args = common_args(&shape, rank, state.address());
        drop((relaxed, current));
        let has_board = false;
        let runner = Self {
            state,
            replica_state,
            block,
            move_up,
            cluster,
            device,
            has_board,
            shape,
            shared_bytes,
            args,
        };
        runner.warm()?;
        Ok(runner)
    }

    /// Take part in a board, and say so on it: from now on [`Quotas::Live`] may be asked for. Nobody else posts for this rank.
    ///
    /// `shape`: experts as the kernel's, or as many as ranks, for the short form of loads a rank; redundant experts as the
    /// kernel's, and with any no short form. The memory stays as it is until the process ends, because launches, and graphs
    /// that captured them, may outlive the runner.
    ///
    /// # Errors
    /// A board of another shape, or memory that the driver cannot register.
    pub fn attach<R: Region + 'static>(&mut self, region: R, shape: BoardShape) -> Result<()> {
        let fits = shape.has_counts_per_rank() || shape.experts == self.shape.experts;
        if shape.ranks != self.shape.ranks || !fits {
            let ranks = self.shape.ranks;
            return Err(Error::Argument(format!(
                "a board of {} ranks and {} counts: give one of {ranks} ranks with {ranks} counts, one for each rank, or {}, \
                 one for each expert",
                shape.ranks, shape.experts, self.shape.experts
            )));
        }
        if shape.redundant != self.shape.redundant {
            return Err(Error::Argument(format!(
                "a board with {} redundant experts: give one with {}, as the kernel has",
                shape.redundant, self.shape.redundant
            )));
        }
        waterfill_core::check_length("region", region.words().len(), shape.words())?;
        let region: &'static R = Box::leak(Box::new(region));
        // `Region` is a safe trait: these words, which the kernel will use, are asked for once and checked themselves.
        let words: &'static [_] = region.words();
        waterfill_core::check_length("region", words.len(), shape.words())?;
        let _current = self.device.current()?;
        let _relaxed = RelaxedCapture::new()?;
        // SAFETY: `words` is borrowed for as long as the process lives, so they stay where they are.
        let address = unsafe { register(words.as_ptr() as usize, size_of_val(words))? };
        self.args = with_board(self.args, &shape, address);
        self.has_board = true;
        waterfill_board::Tally::announce(region, shape, self.args.rank as usize);
        Ok(())
    }

    /// Words that [`count`](Self::count) writes, or, with redundant experts, [`count_replicas`](Self::count_replicas): those
    /// that a rank posts, but for the last, which says whether it waits.
    #[must_use]
    pub fn words(&self) -> usize {
        let Shape { ranks, redundant, .. } = self.shape;
        let per_rank = self.args.posts_experts == 0 && redundant == 0;
        let experts = if per_rank { ranks } else { self.shape.experts };
        BoardShape { ranks, experts, redundant }.posted_waits()
    }

    /// The most rows that a call may have.
    #[must_use]
    pub fn max_rows(&self) -> usize {
        let (shape, most_blocks, shared_bytes) =
            (&self.shape, self.most_blocks(), self.shared_bytes);
        let fits = |rows: &usize| {
            let chooses = shape.redundant > 0;
            shape.cut(*rows, most_blocks, shared_bytes).is_ok()
                && (!chooses || shape.cut_replicas(*rows, most_blocks, shared_bytes).is_ok())
        };
        // Fewer rows always fit too: `Shape::cut`.
        let (mut least, mut most) = (0, MAX_ROWS);
        while least < most {
            let middle = usize::div_ceil(least + most, 2);
            if fits(&middle) { least = middle } else { most = middle - 1 }
        }
        least
    }

    /// Launch one call on `stream`, a stream of the runner's device, or 0.
    ///
    /// Nothing is allocated or waited for, so a graph can capture it.
    ///
    /// # Errors
    /// More rows than fit, [`Quotas::Live`] without a board or on one with redundant experts, or what the driver refuses.
    ///
    /// # Safety
    /// The addresses are those of arrays of the shape's types and the lengths that [`Call`] names, alive
    /// until the launch (and each replay of a graph with it) has run; nothing of it is written by others
    /// meanwhile: blocks that saw different quotas would wait for each other at different places. Launches of one runner run one after the other.
    pub unsafe fn launch(&self, call: &Call, stream: usize) -> Result<()> {
        let current = self.device.current()?;
        // SAFETY: the caller's promise.
        unsafe { self.launch_on(&current, call, Stream::borrow(stream)) }
    }

    /// Write what a call would post, [`words`](Self::words) 32-bit words at `out`, and nothing else: for a
    /// collective that brings all ranks' to [`Quotas::Gathered`]. As [`launch`](Self::launch), a graph can capture it.
    ///
    /// # Errors
    /// More rows than fit, a shape with redundant experts, or what the driver refuses.
    ///
    /// # Safety
    /// As there, for the call's inputs and `out`; its outputs and quotas are not looked at.
    pub unsafe fn count(&self, call: &Call, out: u64, stream: usize) -> Result<()> {
        if self.shape.redundant > 0 {
            return Err(Error::Argument(format!(
                "counts without a table of replicas, with {} redundant experts: count for a choice of replicas",
                self.shape.redundant
            )));
        }
        let current = self.device.current()?;
        let cut =
            self.shape.cut(call.rows, self.most_blocks(), self.shared_bytes)?.without_writers();
        let args = Args { mode: COUNT, words: out, out_ids: 0, ..self.args_of(call, &cut) };
        // SAFETY: the caller's promise.
        unsafe { self.run(&current, &cut, args, Stream::borrow(stream)) }
    }

    /// Write `count` ids to `out` as 64 bits, moved up past the shared experts of the ranks before theirs; a negative one
    /// stays, one at or above the number of experts becomes -1. As [`launch`](Self::launch), a graph can capture it; nothing
    /// of the runner's state is read or written, so it may be on any stream. Without ids nothing is launched.
    ///
    /// # Errors
    /// What the driver refuses.
    ///
    /// # Safety
    /// At `ids` are `count` ids of the shape's type and at `out` is room for as many 64-bit integers, both alive until the
    /// launch (and each replay of a graph with it) has run. `stream` is a stream of the runner's device, or 0.
    pub unsafe fn move_up(&self, ids: u64, out: u64, count: usize, stream: usize) -> Result<()> {
        // SAFETY: the caller's promise; there are no primaries.
        unsafe { self.move_primaries_up(ids, out, count, (0, 0), stream) }
    }

    /// The same by the primary replicas of the ids' experts: `(primaries, logical)` are 32-bit `[P]`, the primary replica of
    /// each physical expert, and 64-bit `[P]`, the logical expert of each by the server's own map. An id whose primary is not
    /// of the same logical expert goes out by itself. 0 for either: none.
    ///
    /// # Errors
    /// As there.
    ///
    /// # Safety
    /// As there, for both arrays too.
    pub unsafe fn move_primaries_up(
        &self,
        ids: u64,
        out: u64,
        count: usize,
        (primaries, logical): (u64, u64),
        stream: usize,
    ) -> Result<()> {
        if count == 0 {
            return Ok(());
        }
        let _current = self.device.current()?;
        let count_of_ids = count as u64;
        let args =
            MoveArgs { ids, out, primaries, logical, count: count_of_ids, ..move_args(&self.args) };
        // SAFETY: the kernel's parameter is `MoveArgs`; the rest is the caller's promise.
        unsafe { self.move_up.launch(launch_of_ids(count), Stream::borrow(stream), &args) }
    }

    /// # Safety
    /// As [`launch`](Self::launch).
    unsafe fn launch_on(
        &self,
        current: &CurrentContext,
        call: &Call,
        stream: Stream,
    ) -> Result<()> {
        let cut = self.shape.cut(call.rows, self.most_blocks(), self.shared_bytes)?;
        let mut args = self.args_of(call, &cut);
        match call.quotas {
            Quotas::Own => args.mode = OWN,
            Quotas::Given { address } => (args.mode, args.quotas) = (GIVEN, address),
            Quotas::Live { .. } | Quotas::Gathered { .. } if !self.has_board => {
                return Err(Error::Argument(
                    "live quotas without a board: attach one first".into(),
                ));
            }
            Quotas::Live { .. } | Quotas::Gathered { .. } if self.shape.redundant > 0 => {
                return Err(Error::Argument(format!(
                    "live quotas on a board with {} redundant experts: choose replicas, then give the quotas from there",
                    self.shape.redundant
                )));
            }
            Quotas::Live { cap } => (args.mode, args.cap_ns) = (LIVE, nanoseconds(cap)),
            Quotas::Gathered { cap, address } => {
                (args.mode, args.cap_ns, args.words) = (LIVE, nanoseconds(cap), address);
            }
        }
        // SAFETY: the caller's promise.
        unsafe { self.run(current, &cut, args, stream) }
    }

    /// # Safety
    /// The addresses of `args` are as [`launch`](Self::launch) and [`count`](Self::count) ask for.
    unsafe fn run(
        &self,
        _: &CurrentContext,
        cut: &Geometry,
        args: Args,
        stream: Stream,
    ) -> Result<()> {
        let launch = launch_of(cut);
        // SAFETY: the kernel's parameter is `Args`; its addresses are the caller's promise, or live with
        // this runner, and the board's layout is that of the board's own crate.
        unsafe { self.kernels(cut.blocks).of(args.mode).launch(launch, stream, &args) }
    }

    fn args_of(&self, call: &Call, cut: &Geometry) -> Args {
        Args {
            ids: call.ids,
            weights: call.weights,
            out_ids: call.out_ids,
            out_weights: call.out_weights,
            unpadded: call.unpadded,
            rows: call.rows as u32,
            shared_weight: weight_bits(self.shape.weight, call.shared_weight),
            ..with_cut(self.args, cut)
        }
    }

    pub(crate) fn most_blocks(&self) -> usize {
        self.cluster.as_ref().map_or(1, |cluster| cluster.most_blocks)
    }

    pub(crate) fn kernels(&self, blocks: usize) -> &Kernels {
        let cluster = self.cluster.as_ref().filter(|_| blocks > 1);
        cluster.map_or(&self.block, |cluster| &cluster.kernels)
    }

    /// How the calls on `stream` so far ended; waits for them. Calls with [`Quotas::Own`] are not counted, and those with
    /// [`Quotas::Given`] are live unless they are torn. With redundant experts they are those that chose replicas, and no
    /// others. Not while a graph is captured.
    ///
    /// # Errors
    /// What the driver refuses.
    ///
    /// # Safety
    /// `stream` is a stream of the runner's device, or 0.
    pub unsafe fn tally(&self, stream: usize) -> Result<Ended> {
        let _current = self.device.current()?;
        // SAFETY: the caller's promise.
        let stream = unsafe { Stream::borrow(stream) };
        let state = self.replica_state.as_ref().unwrap_or(&self.state).read(stream)?;
        Ok(Ended(state.tally))
    }

    /// One empty launch of each kernel: whatever the driver does lazily, it does now.
    fn warm(&self) -> Result<()> {
        let _current = self.device.current()?;
        let _relaxed = RelaxedCapture::new()?;
        let stream = OwnStream::new()?;
        let cluster = self.cluster.as_ref().map(|cluster| cluster.most_blocks);
        for blocks in std::iter::once(1).chain(cluster) {
            let cut = self.shape.geometry(blocks, 0);
            let args = with_cut(self.args, &cut);
            for kernel in self.kernels(blocks).expanding() {
                // SAFETY: the kernel's parameter is `Args`; there are no rows, so no address is read or written.
                unsafe { kernel.launch(launch_of(&cut), stream.0, &args)? };
            }
            if let Some(kernel) = &self.kernels(blocks).choose {
                let cut = self.shape.replica_geometry(blocks, 0);
                let args = replica_args(self.args, &cut);
                // SAFETY: the kernel's parameter is `ReplicaArgs`; in mode OWN no address is read or written.
                unsafe { kernel.launch(launch_of_replicas(&cut), stream.0, &args)? };
            }
        }
        // SAFETY: the kernel's parameter is `MoveArgs`; there are no ids, so no address is read or written.
        unsafe { self.move_up.launch(launch_of_ids(1), stream.0, &move_args(&self.args))? };
        stream.0.synchronize()
    }
}

pub(crate) fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// Kernels from the cache or from NVRTC, which compiles them side by side; anew if the driver does not take what the cache had.
fn load(
    compiler: &Compiler,
    shape: &Shape,
    clustered: bool,
    architecture: u32,
    shared_bytes: usize,
) -> Result<Kernels> {
    let compile = |own_only| compiler.compile(shape, Variant { clustered, own_only }, architecture);
    let (own_only, any) = std::thread::scope(|scope| {
        let own_only = scope.spawn(|| compile(true));
        let any = compile(false);
        (own_only.join().expect("a compiler that fails says so"), any)
    });
    let load = |own_only, code: Vec<u8>| {
        Kernel::load(&code, EXPAND, shared_bytes).or_else(|_| {
            compiler.forget(shape, Variant { clustered, own_only }, architecture);
            Kernel::load(&compile(own_only)?, EXPAND, shared_bytes)
        })
    };
    let (own_only, any) = (load(true, own_only?)?, load(false, any?)?);
    let choose =
        (shape.redundant > 0).then(|| any.beside_with(CHOOSE, shared_bytes)).transpose()?;
    Ok(Kernels { own_only, any, choose })
}

/// The kernels for clusters, and the largest that the device runs with all the shared memory they may take.
fn cluster(
    compiler: &Compiler,
    shape: &Shape,
    architecture: u32,
    shared_bytes: usize,
) -> Result<Option<Cluster>> {
    if architecture < WITH_CLUSTERS {
        return Ok(None);
    }
    let kernels = load(compiler, shape, true, architecture, shared_bytes)?;
    for kernel in kernels.all() {
        // Refused where not supported; then the smaller size is found below.
        let _ = kernel.allow_large_clusters();
    }
    let runs = |blocks: usize| {
        let launch = Launch { blocks, cluster: blocks, threads: MOST_THREADS, shared_bytes };
        kernels.all().all(|kernel| kernel.clusters(launch).is_ok_and(|count| count > 0))
    };
    // Where not even a cluster without rows has room, one block may.
    let has_room = |blocks: usize| {
        let chooses = shape.redundant > 0;
        shape.geometry(blocks, 0).shared_bytes <= shared_bytes
            && (!chooses || shape.replica_geometry(blocks, 0).shared_bytes <= shared_bytes)
    };
    let most_blocks = CLUSTERS.into_iter().find(|&blocks| has_room(blocks) && runs(blocks));
    Ok(most_blocks.map(|most_blocks| Cluster { kernels, most_blocks }))
}
