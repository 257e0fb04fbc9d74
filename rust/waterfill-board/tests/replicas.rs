//! Replicas over a board: every rank's part of the core's plan, and none where maps differ or are not known.
#![cfg(not(any(loom, shuttle)))]

mod support;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;

use waterfill_board::{
    BoardPlanner, Heap, Outcome, Pace, PlannerThread, Port, Posted, Region, Shape,
};
use waterfill_core::{
    CostModel, Plan, Planner, Problem, ReplicaCounts, ReplicaQuotas, ReplicaTable, Roofline, Routed,
};

use support::{Batch, COST, Watched};

const LONG: Duration = Duration::from_secs(20);
const RANKS: usize = 3;

/// Two layers of three ranks with four experts each, of which three are redundant.
fn tables() -> [Arc<ReplicaTable>; 2] {
    [[0, 1, 2, 3, 0, 4, 5, 1, 6, 7, 8, 0], [8, 7, 6, 5, 4, 3, 2, 1, 8, 7, 6, 0]]
        .map(|map| Arc::new(ReplicaTable::new(RANKS, &map).unwrap()))
}

fn shape() -> Shape {
    Shape::with_redundant(RANKS, 12, 3).unwrap()
}

/// Quotas and replica quotas of `rank` in the core's plan, with shared rows or without.
fn expected(table: &ReplicaTable, call: u64, rank: usize, shared: bool) -> (Vec<u32>, Vec<u32>) {
    let batches = [0, 1, 2].map(|rank| Batch::new(shape(), rank, call));
    expected_of(table, &batches, rank, shared)
}

fn expected_of(
    table: &ReplicaTable,
    batches: &[Batch; RANKS],
    rank: usize,
    shared: bool,
) -> (Vec<u32>, Vec<u32>) {
    let counts: Vec<u32> = batches.iter().flat_map(|batch| batch.counts.clone()).collect();
    let routed: Vec<u32> = (0..12).map(|e| counts.iter().skip(e).step_by(12).sum()).collect();
    let told = |words: &[u32]| if shared { words.to_vec() } else { vec![0; words.len()] };
    let tokens = told(&batches.iter().map(|batch| batch.tokens).collect::<Vec<_>>());
    let visits: Vec<u32> = batches.iter().flat_map(|batch| told(&batch.visits)).collect();
    let (placement, routed) = (table.placement(), Routed::PerExpert(&routed));
    let (tokens, visits) = (&tokens[..], Some(&visits[..]));
    let problem = Problem { placement, cost: &COST, routed, tokens, visits, eligible: None };
    let mut reduced = ReplicaCounts::new();
    let mut jobs = |counts: &[u32]| {
        reduced.reduce(table.placement(), counts).unwrap();
        let mut jobs = reduced.jobs().to_vec();
        jobs.resize(shape().redundant, 0);
        jobs
    };
    let jobs: Vec<u32> = batches.iter().flat_map(|batch| jobs(&batch.counts)).collect();
    let (mut plan, mut divided, mut quotas) = (Plan::new(), ReplicaQuotas::new(), vec![0; RANKS]);
    Planner::new().replicas(&problem, &mut plan).unwrap();
    divided.divide(table, &jobs, plan.replica_rows()).unwrap();
    plan.quotas_of(rank, &mut quotas).unwrap();
    (quotas, divided.of(rank).to_vec())
}

fn start() -> (Arc<Heap>, PlannerThread) {
    let board = Arc::new(Heap::new(shape()));
    let planner = BoardPlanner::new(Arc::clone(&board), shape(), COST, LONG).unwrap();
    (board, PlannerThread::spawn(planner, Pace::Spin(None)).unwrap())
}

/// All ranks make `calls` calls, each with the table that `table_of(rank, call)` gives.
fn run(
    board: &Arc<Heap>,
    calls: u64,
    table_of: impl Fn(usize, u64) -> Option<Arc<ReplicaTable>> + Sync,
    check: impl Fn(usize, u64, Vec<u32>, Option<&[u32]>) + Sync,
) {
    thread::scope(|scope| {
        for rank in 0..RANKS {
            let (table_of, check) = (&table_of, &check);
            let mut port = Port::new(Arc::clone(board), shape(), COST, rank).unwrap();
            scope.spawn(move || {
                for call in 0..calls {
                    let batch = Batch::new(shape(), rank, call);
                    // Every other call's shared rows are not routed.
                    let visits = [0; RANKS];
                    let posted = match call % 2 {
                        0 => batch.posted(),
                        _ => Posted { tokens: 0, visits: &visits, ..batch.posted() },
                    };
                    let mut quotas = vec![0; RANKS];
                    port.set_table(table_of(rank, call).as_ref()).unwrap();
                    let outcome = port.exchange(posted, LONG, &mut quotas).unwrap();
                    assert_eq!(outcome, Outcome::Live);
                    check(rank, call, quotas, port.replica_quotas());
                }
            });
        }
    });
}

#[test]
fn every_rank_takes_its_part_of_the_plan() {
    let ((board, planner), tables) = (start(), tables());
    (0..2).for_each(|layer| planner.set_map(layer, Arc::clone(&tables[layer])));
    // Of a period that the ring has not, so that each of its slots has had plans of either length.
    let table = |call: u64| &tables[call as usize / 2 % 3 % 2];
    run(
        &board,
        1000,
        |_, call| Some(Arc::clone(table(call))),
        |rank, call, quotas, replica_quotas| {
            let expected = expected(table(call), call, rank, call % 2 == 0);
            assert_eq!((quotas, replica_quotas.unwrap().to_vec()), expected, "call {call}");
        },
    );
    let published = planner.finish().unwrap();
    assert_eq!((published.whole, published.replicas), (1000, 1000));
    assert!(published.planned < published.home);
}

#[test]
fn maps_that_differ_or_are_not_known_leave_replicas_as_routed() {
    let ((board, planner), tables) = (start(), tables());
    planner.set_map(0, Arc::clone(&tables[0]));
    let table_of = |rank: usize, call: u64| match call % 4 {
        0 => Some(Arc::clone(&tables[usize::from(rank == 1)])), // Rank 1 has another map.
        1 => Some(Arc::clone(&tables[1])),                      // The planner does not know it.
        2 => (rank > 0).then(|| Arc::clone(&tables[0])),        // Rank 0 has none.
        _ => Some(Arc::clone(&tables[0])),
    };
    run(&board, 400, table_of, |_, call, _, replica_quotas| {
        assert_eq!(replica_quotas.is_some(), call % 4 == 3, "call {call}");
    });
    assert_eq!(planner.finish().unwrap().replicas, 100);
}

#[test]
fn a_map_that_changes_is_followed_from_the_next_call_on() {
    let (board, tables) = (Arc::new(Heap::new(shape())), tables());
    let mut planner = BoardPlanner::new(Arc::clone(&board), shape(), COST, LONG).unwrap();
    let mut ports =
        [0, 1, 2].map(|rank| Port::new(Arc::clone(&board), shape(), COST, rank).unwrap());
    for call in 0..20 {
        let table = &tables[call as usize % 2];
        planner.set_map(0, Arc::clone(table));
        let batches = [0, 1, 2].map(|rank| Batch::new(shape(), rank, call));
        for (port, batch) in ports.iter_mut().zip(&batches) {
            port.set_table(Some(table)).unwrap();
            port.post(batch.posted()).unwrap();
        }
        // The map is replaced with the counts on the board: then nothing is planned of the one that they name.
        let replaced = call % 5 == 4;
        if replaced {
            planner.set_map(0, Arc::clone(&tables[1 - call as usize % 2]));
        }
        assert!(planner.poll());
        for (rank, (port, batch)) in ports.iter_mut().zip(&batches).enumerate() {
            port.finish(batch.posted(), LONG, &mut [0; RANKS]).unwrap();
            let (_, expected) = expected(table, call, rank, true);
            assert_eq!(port.replica_quotas(), (!replaced).then_some(&expected[..]), "call {call}");
        }
    }
}

#[test]
fn a_foreign_fingerprint_is_not_taken() {
    let (board, table) = (Arc::new(Heap::new(shape())), &tables()[0]);
    let mut planner = BoardPlanner::new(Arc::clone(&board), shape(), COST, LONG).unwrap();
    planner.set_map(0, Arc::clone(table));
    let mut ports =
        [0, 1, 2].map(|rank| Port::new(Arc::clone(&board), shape(), COST, rank).unwrap());
    let batches = [0, 1, 2].map(|rank| Batch::new(shape(), rank, 0));
    for (port, batch) in ports.iter_mut().zip(&batches) {
        port.set_table(Some(table)).unwrap();
        port.post(batch.posted()).unwrap();
    }
    assert!(planner.poll());
    let foreign = &board.words()[shape().replica_quotas(1, 1)];
    foreign.fetch_xor(1, std::sync::atomic::Ordering::Relaxed);
    for (rank, (port, batch)) in ports.iter_mut().zip(&batches).enumerate() {
        let outcome = port.finish(batch.posted(), LONG, &mut [0; RANKS]).unwrap();
        assert_eq!((outcome, port.replica_quotas().is_some()), (Outcome::Live, rank != 1));
    }
}

/// Ranks that are there post; those that are not are gone. Gives how the call ended on each that is there.
fn one_call(
    board: &Arc<Watched>,
    planner: &mut BoardPlanner<Arc<Watched>>,
    ports: &mut [Port<Arc<Watched>>],
    table_of: impl Fn(usize) -> Option<Arc<ReplicaTable>>,
    call: u64,
    gone: Option<usize>,
) {
    let batches: Vec<Batch> = (0..RANKS).map(|rank| Batch::new(shape(), rank, call)).collect();
    for rank in (0..RANKS).filter(|&rank| Some(rank) != gone) {
        ports[rank].set_table(table_of(rank).as_ref()).unwrap();
        ports[rank].post(batches[rank].posted()).unwrap();
    }
    if let Some(gone) = gone {
        board.leave(waterfill_board::End::Rank(gone));
    }
    let begun = std::time::Instant::now();
    while !planner.poll() {
        assert!(begun.elapsed() < LONG);
    }
    for rank in (0..RANKS).filter(|&rank| Some(rank) != gone) {
        let outcome = ports[rank].finish(batches[rank].posted(), LONG, &mut [0; RANKS]).unwrap();
        assert_eq!(outcome, Outcome::Live);
    }
}

#[test]
fn a_gone_rank_and_its_last_map_keep_nobody_from_replicas() {
    let (board, tables) = (Arc::new(Watched::new(shape())), tables());
    let mut planner = BoardPlanner::new(Arc::clone(&board), shape(), COST, LONG).unwrap();
    planner.set_map(0, Arc::clone(&tables[0]));
    planner.set_map(1, Arc::clone(&tables[1]));
    let port = |rank| Port::new(Arc::clone(&board), shape(), COST, rank).unwrap();
    let mut ports = [0, 1, 2].map(port);
    // Four calls with another map at rank 1, so that all slots of the ring have its fingerprint; then it is gone.
    for call in 0..4 {
        let table_of = |rank| Some(Arc::clone(&tables[usize::from(rank == 1)]));
        one_call(&board, &mut planner, &mut ports, table_of, call, None);
    }
    assert_eq!(planner.published().replicas, 0);
    for call in 4..12 {
        let table_of = |_| Some(Arc::clone(&tables[0]));
        one_call(&board, &mut planner, &mut ports, table_of, call, Some(1));
        for rank in [0, 2] {
            let batch = Batch::new(shape(), rank, call);
            let quotas = ports[rank].replica_quotas().unwrap();
            for job in 0..tables[0].jobs() {
                let slots = tables[0].slots_of(job);
                let replicas = &tables[0].replicas()[slots.clone()];
                let rows: u32 = replicas.iter().map(|&r| batch.counts[r as usize]).sum();
                assert_eq!(quotas[slots.clone()].iter().sum::<u32>(), rows);
                for (slot, &replica) in slots.zip(replicas) {
                    let on_gone = tables[0].placement().rank_of(replica as usize) == 1;
                    assert!(!on_gone || quotas[slot] == 0, "rows for the gone rank");
                }
            }
        }
    }
    assert_eq!((planner.published().replicas, planner.published().partial), (8, 8));
}

#[test]
fn a_planners_table_of_another_shape_is_never_used() {
    let (board, tables) = (Arc::new(Watched::new(shape())), tables());
    let mut planner = BoardPlanner::new(Arc::clone(&board), shape(), COST, LONG).unwrap();
    // As many experts, of which fewer are redundant.
    let other = ReplicaTable::new(RANKS, &[0, 1, 2, 3, 0, 4, 5, 1, 6, 7, 8, 9]).unwrap();
    let fingerprint = u64::from(other.fingerprint());
    planner.set_map(0, Arc::new(other));
    let mut ports =
        [0, 1, 2].map(|rank| Port::new(Arc::clone(&board), shape(), COST, rank).unwrap());
    let batches = [0, 1, 2].map(|rank| Batch::new(shape(), rank, 0));
    for (rank, (port, batch)) in ports.iter_mut().zip(&batches).enumerate() {
        port.set_table(Some(&tables[0])).unwrap();
        port.post(batch.posted()).unwrap();
        // In place of the fingerprint that it posted.
        let word = &board.words()[shape().counts(1, rank) + shape().posted_fingerprint().unwrap()];
        word.store(1 << 32 | fingerprint, std::sync::atomic::Ordering::Relaxed);
    }
    assert!(planner.poll());
    assert_eq!((planner.published().whole, planner.published().replicas), (1, 0));
}

#[test]
fn words_of_an_earlier_call_are_not_taken() {
    let (board, table) = (Arc::new(Heap::new(shape())), &tables()[0]);
    let mut planner = BoardPlanner::new(Arc::clone(&board), shape(), COST, LONG).unwrap();
    planner.set_map(0, Arc::clone(table));
    let mut ports =
        [0, 1, 2].map(|rank| Port::new(Arc::clone(&board), shape(), COST, rank).unwrap());
    for call in 1..=5 {
        let batches = [0, 1, 2].map(|rank| Batch::new(shape(), rank, call));
        for (port, batch) in ports.iter_mut().zip(&batches) {
            port.set_table(Some(table)).unwrap();
            port.post(batch.posted()).unwrap();
        }
        assert!(planner.poll());
        if call == 5 {
            // The first slot's word of rank 1 is that of call 1, in the same place of the ring.
            let word = &board.words()[shape().replica_quotas(5, 1) + 1];
            word.store(1 << 32 | 7, std::sync::atomic::Ordering::Relaxed);
        }
        for (rank, (port, batch)) in ports.iter_mut().zip(&batches).enumerate() {
            let cap = if call == 5 && rank == 1 { Duration::from_millis(5) } else { LONG };
            let outcome = port.finish(batch.posted(), cap, &mut [0; RANKS]).unwrap();
            let whole = call < 5 || rank != 1;
            assert_eq!(outcome == Outcome::Live, whole, "call {call}, rank {rank}");
            assert_eq!(port.replica_quotas().is_some(), whole);
            port.set_table(None).unwrap();
            assert_eq!(port.replica_quotas(), None);
        }
    }
}

#[test]
fn tables_of_other_shapes_are_refused() {
    let board = Arc::new(Heap::new(shape()));
    let mut port = Port::new(board, shape(), COST, 0).unwrap();
    let other = Arc::new(ReplicaTable::new(3, &[0, 1, 2, 3, 4, 0, 5, 6, 7, 1, 8, 9]).unwrap());
    let refused = port.set_table(Some(&other)).unwrap_err().to_string();
    assert!(refused.contains("redundant experts of the table"), "{refused}");
    let refused = Shape::with_redundant(2, 4, 4).unwrap_err().to_string();
    assert!(refused.contains("4 redundant of 4"), "{refused}");
}

#[test]
fn a_cost_model_that_needs_the_rows_of_each_expert_is_refused() {
    let roofline = || CostModel::Roofline(Roofline::new(11.2, 0.061, 64).unwrap());
    let board = Arc::new(Heap::new(shape()));
    let refused = BoardPlanner::new(board, shape(), roofline(), LONG).unwrap_err().to_string();
    assert!(refused.contains("3 redundant experts: give that of rows"), "{refused}");
    let without = Shape::new(RANKS, 12).unwrap();
    BoardPlanner::new(Arc::new(Heap::new(without)), without, roofline(), LONG).unwrap();
}

#[test]
fn words_past_the_jobs_and_bits_of_replicas_are_not_taken() {
    let (board, table) = (Arc::new(Heap::new(shape())), &tables()[0]);
    assert!(table.jobs() < shape().redundant);
    let mut planner = BoardPlanner::new(Arc::clone(&board), shape(), COST, LONG).unwrap();
    planner.set_map(0, Arc::clone(table));
    let mut ports =
        [0, 1, 2].map(|rank| Port::new(Arc::clone(&board), shape(), COST, rank).unwrap());
    // Those of replicas, and those past the last expert.
    let no_experts =
        table.replicas().iter().fold(0xffff_f000, |bits, &replica| bits | 1u64 << replica);
    for call in 0..40u32 {
        let mut batches = [0, 1, 2].map(|rank| Batch::new(shape(), rank, call.into()));
        // So few rows that active experts decide.
        batches.iter_mut().flat_map(|batch| &mut batch.counts).for_each(|rows| *rows %= 4);
        for (rank, (port, batch)) in ports.iter_mut().zip(&batches).enumerate() {
            port.set_table(Some(table)).unwrap();
            port.post(batch.posted()).unwrap();
            let start = shape().counts(call + 1, rank);
            let words = &board.words()[start..];
            let past = &words[shape().posted_jobs().end - 1];
            let sequence = u64::from(call + 1) << 32;
            assert_eq!(past.load(Ordering::Relaxed), sequence);
            past.store(sequence | u64::from(u32::MAX), Ordering::Relaxed);
            words[shape().posted_active().start].fetch_or(no_experts, Ordering::Relaxed);
        }
        assert!(planner.poll());
        for (rank, (port, batch)) in ports.iter_mut().zip(&batches).enumerate() {
            let mut quotas = vec![0; RANKS];
            port.finish(batch.posted(), LONG, &mut quotas).unwrap();
            let found = (quotas, port.replica_quotas().unwrap().to_vec());
            assert_eq!(found, expected_of(table, &batches, rank, true), "call {call}");
        }
    }
}

#[test]
fn jobs_of_maps_that_differ_count_at_each_rank_alike() {
    let (board, tables) = (Arc::new(Heap::new(shape())), tables());
    let mut planner = BoardPlanner::new(Arc::clone(&board), shape(), COST, LONG).unwrap();
    let mut ports =
        [0, 1, 2].map(|rank| Port::new(Arc::clone(&board), shape(), COST, rank).unwrap());
    for call in 0..20 {
        let batches = [0, 1, 2].map(|rank| Batch::new(shape(), rank, call));
        let (mut loads, mut of_jobs) = ([0; RANKS], 0);
        for (rank, (port, batch)) in ports.iter_mut().zip(&batches).enumerate() {
            let table = [None, Some(&tables[0]), Some(&tables[1])][(rank + call as usize) % 3];
            port.set_table(table).unwrap();
            port.post(batch.posted()).unwrap();
            for (physical, &rows) in batch.counts.iter().enumerate() {
                match table.and_then(|table| table.job_of(physical)) {
                    Some(_) => of_jobs += rows,
                    None => loads[physical / 4] += rows,
                }
            }
        }
        assert!(planner.poll());
        let routed = loads.map(|load| load + of_jobs / RANKS as u32);
        let placement = waterfill_core::Placement::contiguous(RANKS, 12).unwrap();
        let visits: Vec<u32> = batches.iter().flat_map(|batch| batch.visits.clone()).collect();
        let tokens: Vec<u32> = batches.iter().map(|batch| batch.tokens).collect();
        let problem = Problem {
            placement: &placement,
            cost: &COST,
            routed: Routed::PerRank(&routed),
            tokens: &tokens,
            visits: Some(&visits),
            eligible: None,
        };
        let mut plan = Plan::new();
        Planner::new().live(&problem, &mut plan).unwrap();
        for (rank, (port, batch)) in ports.iter_mut().zip(&batches).enumerate() {
            let (mut quotas, mut expected) = ([0; RANKS], [0; RANKS]);
            port.finish(batch.posted(), LONG, &mut quotas).unwrap();
            plan.quotas_of(rank, &mut expected).unwrap();
            assert_eq!(quotas, expected, "call {call}, rank {rank}");
        }
    }
}
