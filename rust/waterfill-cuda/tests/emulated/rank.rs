//! One rank's calls without a board, each compared with the core.

use std::fmt::Debug;

use cuda_emulator::Kernel;
use waterfill_core::Weight;
use waterfill_cuda::internal::{Args, COUNT, GIVEN, Geometry, Launch, OWN, State};
use waterfill_cuda::internal::{common_args, launch_of, weight_bits, with_cut};
use waterfill_cuda::{Shape, Variant};

use super::batch::{AnyId, Batch, Counted, Random};
use super::kernel;

/// Nothing, or what is wrong.
pub type Checked = Result<(), String>;

const SHARED: usize = 227 << 10;
/// Elements past the end of each output, which have to stay as they were.
const GUARD: usize = 16;
/// What an output holds before the launch, in each byte.
const UNTOUCHED: u8 = 0x5a;

/// One rank with its kernels, compiled when they are first launched.
pub struct Rank<'a> {
    pub shape: Shape,
    pub rank: usize,
    kernels: Vec<(Variant, Kernel)>,
    compile: &'a dyn Fn(&Shape, Variant) -> Kernel,
    pub random: Random,
}

impl<'a> Rank<'a> {
    pub fn new(shape: Shape, compile: &'a dyn Fn(&Shape, Variant) -> Kernel) -> Self {
        shape.check().unwrap();
        let mut random = Random(shape.ranks as u64);
        let rank = random.below(shape.ranks);
        Self { shape, rank, kernels: Vec::new(), compile, random }
    }

    /// As the runner cuts a call, on a device with clusters of up to 16 or 8 blocks, or with none if one block fits.
    fn cut(&mut self, rows: usize) -> Geometry {
        let most_blocks = self.random.pick(&[1, 8, 16, 16]);
        let cut = |most_blocks| self.shape.cut(rows, most_blocks, SHARED);
        cut(most_blocks).or_else(|_| cut(16)).unwrap()
    }

    pub fn args(&self, state: &mut State) -> Args {
        common_args(&self.shape, self.rank, address_mut(std::slice::from_mut(state)))
    }

    fn launch(&mut self, cut: &Geometry, args: Args, meanwhile: &mut dyn FnMut()) -> Checked {
        // Own counts are for either kernel.
        let own_only = args.mode == OWN && self.random.below(2) == 0;
        self.launch_kernel(own_only, cut, args, meanwhile)
    }

    fn launch_kernel(
        &mut self,
        own_only: bool,
        cut: &Geometry,
        args: Args,
        meanwhile: &mut dyn FnMut(),
    ) -> Checked {
        let variant = Variant { clustered: cut.blocks > 1, own_only };
        self.launch_variant(variant, launch_of(cut), &with_cut(args, cut), meanwhile)
    }

    /// One launch of one of the kernels.
    pub fn launch_variant(
        &mut self,
        variant: Variant,
        launch: Launch,
        args: &Args,
        meanwhile: &mut dyn FnMut(),
    ) -> Checked {
        if self.kernels.iter().all(|(compiled, _)| *compiled != variant) {
            self.kernels.push((variant, (self.compile)(&self.shape, variant)));
        }
        let mut kernels = self.kernels.iter_mut();
        let (_, kernel) = kernels.find(|(compiled, _)| *compiled == variant).unwrap();
        let seed = self.random.next() as u32;
        // SAFETY: every caller sets the addresses of arrays that it holds, of the lengths that the kernel is told.
        unsafe { kernel.launch(kernel::launch(launch), args, seed, meanwhile) }
    }

    /// A call's outputs are those of the core with these quotas.
    pub fn expands<I: AnyId, W: Weight>(
        &mut self,
        batch: &Batch<I, W>,
        args: Args,
        quotas: &[u32],
        meanwhile: &mut dyn FnMut(),
    ) -> Checked {
        let (ids, weights) = batch.expanded(&self.shape, self.rank, quotas);
        let (mut out_ids, mut out_weights) = (untouched_like(&ids), untouched_like(&weights));
        let cut = self.cut(batch.rows);
        let args = Args {
            out_ids: address_mut(&mut out_ids),
            out_weights: address_mut(&mut out_weights),
            ..self.with_batch(batch, args)
        };
        self.launch(&cut, args, meanwhile)?;
        same("ids", bytes(&out_ids), &guarded(&ids))?;
        same("weights", bytes(&out_weights), &guarded(&weights))
    }

    fn with_batch<I, W>(&self, batch: &Batch<I, W>, args: Args) -> Args {
        Args {
            ids: address(&batch.ids),
            weights: address(&batch.weights),
            unpadded: batch.unpadded.as_ref().map_or(0, |rows| address(std::slice::from_ref(rows))),
            rows: batch.rows as u32,
            shared_weight: weight_bits(self.shape.weight, batch.shared_weight),
            ..args
        }
    }

    /// Quotas from own counts; given ones, right and wrong; counts alone.
    pub fn checks<I: AnyId, W: Weight>(&mut self, rows: usize) -> Checked {
        let batch = Batch::<I, W>::random(&mut self.random, &self.shape, rows);
        let counted = batch.counted(&self.shape);
        let own = counted.own_quotas(&self.shape, self.rank);
        let mut state = State::default();
        let args = self.args(&mut state);
        self.expands(&batch, Args { mode: OWN, ..args }, &own, &mut || ())?;
        same("the tally of own quotas", &state.tally, &[0; 5])?;

        let given = counted.random_quotas(&mut self.random, self.rank);
        let args = Args { mode: GIVEN, ..args };
        self.expands(&batch, Args { quotas: address(&given), ..args }, &given, &mut || ())?;
        let wrong = self.wrong(&given);
        self.expands(&batch, Args { quotas: address(&wrong), ..args }, &own, &mut || ())?;
        same("the tally of given quotas", &state.tally, &[1, 0, 0, 0, 1])?;
        self.counts(&batch, &counted)
    }

    /// Quotas that do not add up: one too many or too few, or right but for what 32 bits do not hold.
    pub fn wrong(&mut self, quotas: &[u32]) -> Vec<u32> {
        let mut wrong = quotas.to_vec();
        let rank = self.random.below(quotas.len());
        let change = self.random.pick(&[1, u32::MAX, 1 << 31]);
        wrong[rank] = wrong[rank].wrapping_add(change);
        if change == 1 << 31 {
            let next = (rank + 1) % quotas.len();
            wrong[next] = wrong[next].wrapping_add(change >> u32::from(next == rank));
        }
        wrong
    }

    /// What would be posted, by expert and by rank.
    fn counts<I, W>(&mut self, batch: &Batch<I, W>, counted: &Counted) -> Checked {
        let mut state = State::default();
        for by_expert in [false, true] {
            let posted = counted.posted(by_expert);
            let mut words = untouched_like(&posted);
            let cut = self.cut(batch.rows).without_writers();
            let args = self.with_batch(batch, self.args(&mut state));
            let (posts_experts, words_at) = (u32::from(by_expert), address_mut(&mut words));
            self.launch(
                &cut,
                Args { mode: COUNT, posts_experts, words: words_at, ..args },
                &mut || (),
            )?;
            same("counts", bytes(&words), &guarded(&posted))?;
        }
        same("the state after counts", &state.tally, &[0; 5])
    }

    /// As the runner launches each kernel once.
    pub fn warms(&mut self) -> Checked {
        let mut state = State::default();
        for blocks in [1, 16] {
            let cut = self.shape.geometry(blocks, 0);
            for own_only in [true, false] {
                self.launch_kernel(own_only, &cut, self.args(&mut state), &mut || ())?;
            }
        }
        same("the state after an empty launch", &state.tally, &[0; 5])
    }
}

pub fn address<T>(values: &[T]) -> u64 {
    values.as_ptr() as u64
}

pub fn address_mut<T>(values: &mut [T]) -> u64 {
    values.as_mut_ptr() as u64
}

/// Plain numbers as they stand in memory: NaNs and zeros by their bits.
pub fn bytes<T: Copy>(values: &[T]) -> &[u8] {
    // SAFETY: integers and floats, without padding; any byte is a u8.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

/// An output for such values, with its guard, untouched.
pub fn untouched_like<T: Copy>(values: &[T]) -> Vec<T> {
    let mut out = Vec::with_capacity(values.len() + GUARD);
    // SAFETY: it has the capacity, every element is written, and any bytes are an integer or a float.
    unsafe {
        std::ptr::write_bytes(out.as_mut_ptr(), UNTOUCHED, values.len() + GUARD);
        out.set_len(values.len() + GUARD);
    }
    out
}

/// The bytes of such an output once `values` are written.
pub fn guarded<T: Copy>(values: &[T]) -> Vec<u8> {
    let mut expected = bytes(values).to_vec();
    expected.resize(size_of::<T>() * (values.len() + GUARD), UNTOUCHED);
    expected
}

pub fn same<T: PartialEq + Debug>(what: &str, found: &[T], expected: &[T]) -> Checked {
    let pairs = || found.iter().zip(expected);
    let Some(first) = pairs().position(|(found, expected)| found != expected) else {
        return Ok(());
    };
    let count = pairs().filter(|(found, expected)| found != expected).count();
    let (found, expected) = (&found[first], &expected[first]);
    Err(format!("{what}: {count} differ, the first at {first}: {found:?}, not {expected:?}"))
}
