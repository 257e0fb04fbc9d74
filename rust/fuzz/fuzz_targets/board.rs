//! Any words on a board, anybody here or gone, between any polls and exchanges: quotas add up, nothing panics, nothing hangs.
#![no_main]

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use waterfill_board::{BoardPlanner, End, Heap, Port, Posted, Presence, Region, Shape};
use waterfill_core::{CostModel, ReplicaTable, choose_replicas};

const RANKS: usize = 2;
const PRESENCES: [Presence; 3] = [Presence::Unwatched, Presence::Here, Presence::Gone];

/// A board at which anybody may be gone.
struct Watched {
    heap: Heap,
    /// Of each rank and the planner, by their places in [`PRESENCES`].
    presences: [AtomicU8; RANKS + 1],
}

impl Region for Watched {
    fn words(&self) -> &[AtomicU64] {
        self.heap.words()
    }

    fn presence(&self, end: End) -> Presence {
        let at = match end {
            End::Rank(rank) => rank,
            End::Planner => RANKS,
        };
        PRESENCES[usize::from(self.presences[at].load(Ordering::Relaxed)) % PRESENCES.len()]
    }
}

fuzz_target!(|data: &[u8]| {
    // Rank 0 has experts 0 and 1, rank 1 has 0 and 2.
    let shape = Shape::with_redundant(RANKS, 4, 1).unwrap();
    let table = Arc::new(ReplicaTable::new(RANKS, &[0, 1, 0, 2]).unwrap());
    let board = Arc::new(Watched { heap: Heap::new(shape), presences: Default::default() });
    let planner =
        |patience| BoardPlanner::new(Arc::clone(&board), shape, CostModel::Rows, patience).unwrap();
    let mut planner = planner(Duration::ZERO);
    planner.set_map(0, Arc::clone(&table));
    let mut ports =
        [0, 1].map(|rank| Port::new(Arc::clone(&board), shape, CostModel::Rows, rank).unwrap());
    for step in data.chunks_exact(8) {
        let &[what, place, tag, a, b, c, d, e] = step else { continue };
        let (place, rank) = (usize::from(place), usize::from(place) % RANKS);
        match what % 6 {
            // A word of the ring: the tags of the next few calls, any value.
            0 | 1 => {
                let words = &board.words()[shape.ring()..];
                let value = u64::from(u32::from_le_bytes([a, b, c, d]));
                let word = &words[place % words.len()];
                word.store(u64::from(tag % 16) << 32 | value, Ordering::Relaxed);
            }
            2 => {
                planner.poll();
            }
            // What the ranks are told beside their quotas: near calls, or any.
            3 => {
                let told = [
                    shape.without_plan(rank),
                    shape.deserted(rank),
                    shape.mark(End::Rank(rank)),
                    shape.mark(End::Planner),
                ];
                let near = u64::from(tag % 16) << 32;
                let any = u64::from_le_bytes([a, b, c, d, e, what, tag, 0]).rotate_left(24);
                let value = if e % 2 == 0 { near } else { any };
                board.words()[told[usize::from(a) % told.len()]].store(value, Ordering::Relaxed);
            }
            4 => board.presences[place % (RANKS + 1)].store(tag, Ordering::Relaxed),
            _ => {
                let tokens = u32::from(a);
                let visits = [u32::from(b).min(tokens), u32::from(c).min(tokens)];
                let counts = [d, e, d, 0].map(u32::from);
                let posted = Posted { tokens, visits: &visits, counts: &counts };
                let port = &mut ports[rank];
                port.set_table((tag % 3 > 0).then_some(&table)).unwrap();
                let mut quotas = [0; 2];
                port.post(posted).unwrap();
                let meanwhile = || {
                    planner.poll();
                };
                port.finish_with(posted, Duration::ZERO, &mut quotas, meanwhile).unwrap();
                assert_eq!(quotas.iter().sum::<u32>(), tokens);
                // Whatever its replica quotas are, each id names the expert that it named.
                if let Some(quotas) = port.replica_quotas() {
                    let mut ids = [0, 2, 0, 1, 3, -1];
                    choose_replicas(&table, quotas, &mut ids, 2).unwrap();
                    assert!(
                        ids[..3].iter().all(|id| [0, 2].contains(id)) && ids[3..] == [1, 3, -1]
                    );
                }
            }
        }
    }
});
