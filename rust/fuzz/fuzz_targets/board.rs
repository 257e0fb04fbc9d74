//! Any words on a board, between any polls and exchanges: quotas add up, nothing panics, nothing hangs.
#![no_main]

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use waterfill_board::{BoardPlanner, Heap, Port, Posted, Region, Shape};
use waterfill_core::CostModel;

fuzz_target!(|data: &[u8]| {
    let shape = Shape::new(2, 2).unwrap();
    let board = Arc::new(Heap::new(shape));
    let planner =
        |patience| BoardPlanner::new(Arc::clone(&board), shape, CostModel::Rows, patience).unwrap();
    let mut planner = planner(Duration::ZERO);
    let mut ports =
        [0, 1].map(|rank| Port::new(Arc::clone(&board), shape, CostModel::Rows, rank).unwrap());
    for step in data.chunks_exact(8) {
        let &[what, place, tag, a, b, c, d, _] = step else { continue };
        match what % 4 {
            // A word of the ring: the tags of the next few calls, any value.
            0 | 1 => {
                let words = &board.words()[shape.ring()..];
                let value = u64::from(u32::from_le_bytes([a, b, c, d]));
                let word = &words[usize::from(place) % words.len()];
                word.store(u64::from(tag % 16) << 32 | value, Ordering::Relaxed);
            }
            2 => {
                planner.poll();
            }
            _ => {
                let tokens = u32::from(a);
                let visits = [u32::from(b).min(tokens), u32::from(c).min(tokens)];
                let posted = Posted { tokens, visits: &visits, counts: &[u32::from(d); 2] };
                let port = &mut ports[usize::from(place) % 2];
                let mut quotas = [0; 2];
                port.post(posted).unwrap();
                let meanwhile = || {
                    planner.poll();
                };
                port.finish_with(posted, Duration::ZERO, &mut quotas, meanwhile).unwrap();
                assert_eq!(quotas.iter().sum::<u32>(), tokens);
            }
        }
    }
});
