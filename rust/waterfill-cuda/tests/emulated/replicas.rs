//! The kernel that chooses replicas, against the core and a port of the board's own crate.

use std::sync::Arc;

use waterfill_board::Outcome;
use waterfill_core::{ReplicaCounts, ReplicaTable, choose_replicas, move_up};
use waterfill_cuda::internal::{Args, COUNT, OWN, ReplicaArgs, ReplicaGeometry, State};
use waterfill_cuda::internal::{launch_of_replicas, replica_args};
use waterfill_cuda::{Shape, Variant};

use super::batch::{AnyId, Batch, Counted, Random, placement};
use super::kernel::CHOOSE;
use super::live::{Live, Plan};
use super::rank::{Checked, Rank, address, address_mut, bytes, guarded, same, untouched_like};

const SHARED: usize = 227 << 10;

/// A layer's replicas, as the kernel is told of them.
pub struct Layer {
    pub table: Arc<ReplicaTable>,
    /// Its words; the fingerprint is 0 where no replicas are to be chosen.
    pub words: Vec<u32>,
    /// `[P]` the logical expert of each.
    pub logical: Vec<i64>,
}

impl Layer {
    /// Any placement; a few experts have most replicas, one time in three, and some are twice on a rank.
    pub fn random(random: &mut Random, shape: &Shape) -> Self {
        let experts = shape.experts - shape.redundant;
        let popular = if random.rarely(3) { 1 + random.below(experts.min(3)) } else { experts };
        let mut map: Vec<u32> = (0..experts as u32).collect();
        map.extend((0..shape.redundant).map(|_| random.below(popular) as u32));
        random.shuffle(&mut map);
        let table = Arc::new(ReplicaTable::new(shape.ranks, &map).unwrap());
        let mut words = table.words();
        if random.rarely(8) {
            words[0] = 0;
        }
        Self { table, words, logical: map.into_iter().map(i64::from).collect() }
    }

    fn known(&self) -> Option<&Arc<ReplicaTable>> {
        (self.words[0] != 0).then_some(&self.table)
    }

    /// Quotas of each slot that add up to the rows of each job, but for one job one time in four.
    pub fn quotas(&self, random: &mut Random, counts: &[u32]) -> Vec<u32> {
        let mut quotas = vec![0u32; self.table.slots()];
        for job in 0..self.table.jobs() {
            let slots = self.table.slots_of(job);
            let of = |&replica: &u32| counts[replica as usize];
            let rows: u32 = self.table.replicas()[slots.clone()].iter().map(of).sum();
            // One replica for all of them, or any for each.
            let one = random.rarely(3).then(|| random.below(slots.len()));
            for _ in 0..rows {
                let slot = one.unwrap_or_else(|| random.below(slots.len()));
                quotas[slots.start + slot] += 1;
            }
        }
        if random.rarely(4) {
            let slot = random.below(quotas.len());
            quotas[slot] = quotas[slot].wrapping_add(random.pick(&[1, u32::MAX, 1 << 31]));
        }
        quotas
    }
}

/// One call of the kernel.
#[derive(Clone, Copy)]
pub struct Choosing<'a> {
    pub layer: &'a Layer,
    pub moved: bool,
    /// Whether the server's own map is given.
    pub checked: bool,
}

impl Choosing<'_> {
    /// What a rank posts: no tokens and visits where the shared rows are not routed.
    fn counted(&self, counted: Counted) -> Counted {
        if !self.moved {
            return counted;
        }
        Counted { tokens: 0, visits: vec![0; counted.visits.len()], ..counted }
    }

    fn posted(&self, shape: &Shape, counted: &Counted) -> Vec<u32> {
        let of_table = self.layer.known().map(|table| table.placement().clone());
        let mut reduced = ReplicaCounts::new();
        reduced.reduce(&of_table.unwrap_or_else(|| placement(shape)), &counted.counts).unwrap();
        let mut jobs = reduced.jobs().to_vec();
        jobs.resize(shape.redundant, 0);
        let (tokens, fingerprint) = ([counted.tokens], [self.layer.words[0]]);
        [&tokens, &counted.visits[..], reduced.loads(), &jobs, reduced.active(), &fingerprint]
            .concat()
    }

    fn args(&self, args: Args, cut: &ReplicaGeometry) -> ReplicaArgs {
        ReplicaArgs {
            table: address(&self.layer.words),
            logical: if self.checked { address(&self.layer.logical) } else { 0 },
            moved: self.moved.into(),
            ..replica_args(args, cut)
        }
    }
}

impl Rank<'_> {
    fn cut_replicas(&mut self, rows: usize) -> ReplicaGeometry {
        let most_blocks = self.random.pick(&[1, 8, 16, 16]);
        self.shape.cut_replicas(rows, most_blocks, SHARED).unwrap()
    }

    pub fn launch_replicas(
        &mut self,
        cut: &ReplicaGeometry,
        mut args: ReplicaArgs,
        meanwhile: &mut dyn FnMut(),
    ) -> Checked {
        let variant = Variant { clustered: cut.blocks > 1, own_only: false };
        let words = address_mut(std::slice::from_mut(&mut args));
        let args = Args { mode: CHOOSE, words, ..Args::default() };
        self.launch_variant(variant, launch_of_replicas(cut), &args, meanwhile)
    }

    /// A call's ids are `ids`, and the quotas that it hands on `quotas`, if it does.
    fn chooses<I: AnyId>(
        &mut self,
        batch: &Batch<I, f32>,
        choosing: Choosing,
        args: Args,
        (ids, quotas): (&[i64], &[u32]),
        meanwhile: &mut dyn FnMut(),
    ) -> Checked {
        let cut = self.cut_replicas(batch.rows);
        let narrow: Vec<I> = ids.iter().map(|&id| I::try_from(id).unwrap_or(I::NONE)).collect();
        // Rows that are aligned to 16 bytes, or only as their ids are.
        let shift = self.random.below(2);
        let given = [&vec![I::NONE; shift], &batch.ids[..]].concat();
        let mut out = untouched_like(&[&vec![0; shift], ids].concat());
        let mut out_narrow = untouched_like(&narrow);
        let mut out_quotas = untouched_like(quotas);
        let args = Args { ids: address(&given[shift..]), ..self.batch_args(batch, args) };
        let args = choosing.args(args, &cut);
        let (out_at, quotas_at) = match choosing.moved {
            true => (address_mut(&mut out[shift..]), 0),
            false => (address_mut(&mut out_narrow), address_mut(&mut out_quotas)),
        };
        self.launch_replicas(
            &cut,
            ReplicaArgs { out: out_at, quotas: quotas_at, ..args },
            meanwhile,
        )?;
        if choosing.moved {
            return same("moved ids", bytes(&out[shift..]), &guarded(ids));
        }
        same("ids", bytes(&out_narrow), &guarded(&narrow))?;
        same("quotas", bytes(&out_quotas), &guarded(quotas))
    }

    fn batch_args<I: AnyId>(&self, batch: &Batch<I, f32>, args: Args) -> Args {
        let unpadded = batch.unpadded.as_ref().map(|rows| address(std::slice::from_ref(rows)));
        Args {
            ids: address(&batch.ids),
            unpadded: unpadded.unwrap_or(0),
            rows: batch.rows as u32,
            ..args
        }
    }

    /// What would be posted goes to `words`, and nothing else is written.
    pub fn counts_for_replicas<I: AnyId>(&mut self, rows: usize, moved: bool) -> Checked {
        let layer = Layer::random(&mut self.random, &self.shape);
        let choosing = Choosing { layer: &layer, moved, checked: false };
        let batch = Batch::<I, f32>::random(&mut self.random, &self.shape, rows);
        let posted = choosing.posted(&self.shape, &choosing.counted(batch.counted(&self.shape)));
        let (mut words, mut state) = (untouched_like(&posted), State::default());
        let cut = self.cut_replicas(rows);
        let args = Args { mode: COUNT, words: address_mut(&mut words), ..self.args(&mut state) };
        let args = choosing.args(self.batch_args(&batch, args), &cut);
        self.launch_replicas(&cut, args, &mut || ())?;
        same("counts", bytes(&words), &guarded(&posted))?;
        same("the state after counts", &[state.last, state.failures], &[0, 0])?;
        same("the tally after counts", &state.tally, &[0; 5])
    }

    /// As the runner launches the kernel once.
    pub fn warms_choice(&mut self) -> Checked {
        let mut state = State::default();
        for blocks in [1, 16] {
            let cut = self.shape.replica_geometry(blocks, 0);
            let args = replica_args(Args { mode: OWN, ..self.args(&mut state) }, &cut);
            self.launch_replicas(&cut, args, &mut || ())?;
        }
        same("the state after an empty launch", &state.tally, &[0; 5])
    }
}

/// Ids `[rows, top_k]` as they go out: with the replicas that these quotas say, if any.
fn expected<I: AnyId>(
    shape: &Shape,
    batch: &Batch<I, f32>,
    choosing: Choosing,
    quotas: Option<&[u32]>,
) -> Vec<i64> {
    let mut known: Vec<i64> = batch.known.iter().map(|&id| id.into()).collect();
    if let Some(quotas) = quotas {
        choose_replicas(&choosing.layer.table, quotas, &mut known, shape.top_k).unwrap();
    }
    let experts = 0..shape.experts as i64;
    let first_padded = batch.unpadded.map_or(batch.rows, |unpadded| unpadded.max(0) as usize);
    let id = |(i, (&given, &known)): (usize, (&I, &i64))| match () {
        () if experts.contains(&known) => known,
        () if choosing.moved && given.into() >= experts.end => -1,
        () if !choosing.moved && i / shape.top_k >= first_padded => -1,
        () => given.into(),
    };
    let ids: Vec<i64> = batch.ids.iter().zip(&known).enumerate().map(id).collect();
    if !choosing.moved {
        return ids;
    }
    let mut moved = vec![0; ids.len()];
    move_up(&placement(shape), &ids, shape.top_k, &mut moved).unwrap();
    moved
}

impl Live<'_, '_> {
    /// One call that chooses replicas; `gathered`: all ranks' words come by a collective.
    pub fn chooses<I: AnyId>(&mut self, rows: usize, plan: Plan, gathered: bool) -> Checked {
        let (shape, random) = (self.rank.shape, &mut self.rank.random);
        let layer = Layer::random(random, &shape);
        let (moved, checked) = (random.rarely(2), random.rarely(2));
        let choosing = Choosing { layer: &layer, moved, checked };
        let batch = Batch::<I, f32>::random(random, &shape, rows);
        let counted = choosing.counted(batch.counted(&shape));
        let right = counted.random_quotas(random, self.rank.rank);
        let mut planned = if plan == Plan::Wrong { self.rank.wrong(&right) } else { right };
        planned.extend(self.replicas_planned(&layer, &counted));
        let posted = gathered.then(|| choosing.posted(&shape, &counted));
        self.port.set_table(layer.known()).unwrap();
        self.run(plan, &counted, &planned, posted.as_deref(), |live, args, ended, arrives| {
            let (outcome, quotas) = ended;
            let none = vec![u32::MAX; quotas.len()];
            let quotas = if outcome == Outcome::Live { quotas } else { &none };
            let ids = expected(&shape, &batch, choosing, live.port.replica_quotas());
            live.rank.chooses(&batch, choosing, args, (&ids, quotas), arrives)
        })
    }

    /// The fingerprint of the map that a plan is for, and the quotas of its slots: mostly this layer's.
    fn replicas_planned(&mut self, layer: &Layer, counted: &Counted) -> Vec<u32> {
        let random = &mut self.rank.random;
        let of_none = random.rarely(6);
        let of_other = random.rarely(6);
        let fingerprint = match (of_none, of_other) {
            (true, _) => 0,
            (_, true) => layer.table.fingerprint() ^ 1 << random.below(32),
            _ => layer.table.fingerprint(),
        };
        let mut planned = vec![fingerprint];
        // Another map may have fewer slots; a plan without replicas has none.
        let quotas = layer.quotas(random, &counted.counts);
        let slots = match (of_none, of_other) {
            (true, _) => 0,
            (_, true) => random.below(quotas.len() + 1),
            _ => quotas.len(),
        };
        planned.extend_from_slice(&quotas[..slots]);
        planned
    }
}
