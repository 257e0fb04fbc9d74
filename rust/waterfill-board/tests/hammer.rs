//! One writes a ring of words as fast as it can, another reads them: no value is torn, stale or of another call.
//! As threads (for ThreadSanitizer) and as two processes on a segment.
#![cfg(not(any(loom, shuttle)))]

mod support;

use std::sync::atomic::{AtomicU64, Ordering};

use waterfill_board::testing::{load, sequence, store};
use waterfill_board::{Heap, RING, Region, Segment, Sequence, Shape};

use support::{count, process};

/// Words of one call.
const WORDS: usize = 16;

fn shape() -> Shape {
    Shape::new(2, 8).unwrap()
}

/// The only value that word `index` may have in the call `tag`.
fn value(tag: u32, index: usize) -> u32 {
    (tag ^ (index as u32) << 27).wrapping_mul(0x9e37_79b9) ^ tag.rotate_left(13)
}

fn place(tag: u32, index: usize) -> usize {
    shape().ring() + tag as usize % RING * WORDS + index
}

/// The word by which the reader ends the writer.
fn done(words: &[AtomicU64]) -> &AtomicU64 {
    &words[shape().planner_tally()]
}

/// Ends the writer, also when the reader finds a bad value.
struct Reading<'a>(&'a [AtomicU64]);

impl Drop for Reading<'_> {
    fn drop(&mut self) {
        // Relaxed: partner and reason in `write`.
        done(self.0).store(1, Ordering::Relaxed);
    }
}

/// Gives how many calls it wrote.
fn write(words: &[AtomicU64], first: Sequence) -> u64 {
    let (mut sequence, mut calls) = (first, 0);
    // Relaxed: a flag that guards nothing. Partner: `Reading`.
    while done(words).load(Ordering::Relaxed) == 0 {
        for index in 0..WORDS {
            let (tag, place) = (sequence.tag(), place(sequence.tag(), index));
            store(&words[place], sequence, value(tag, index));
        }
        (sequence, calls) = (sequence.next(), calls + 1);
    }
    calls
}

/// Read `reads` values at least; gives how many were another than the one before them.
fn read(words: &[AtomicU64], reads: u32) -> u64 {
    let _reading = Reading(words);
    let mut newest = [None; RING * WORDS];
    let (mut taken, mut fresh) = (0u32, 0u64);
    while taken < reads || fresh <= 1000 {
        for (at, newest) in newest.iter_mut().enumerate() {
            let (slot, index) = (at / WORDS, at % WORDS);
            let word = &words[place(slot as u32, index)];
            let Some(found) = sequence(word) else { continue };
            assert_eq!(found.tag() as usize % RING, slot, "of another slot");
            assert!(newest.is_none_or(|before| found == before || found.is_after(before)));
            fresh += u64::from(*newest != Some(found));
            *newest = Some(found);
            // The writer may have gone on since; then there is no value of that call any more.
            if let Some(taken_value) = load(word, found) {
                assert_eq!(taken_value, value(found.tag(), index), "call {}", found.tag());
                taken += 1;
            }
        }
    }
    fresh
}

#[test]
fn between_threads_no_word_is_torn_or_stale() {
    let board = Heap::new(shape());
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| write(board.words(), Sequence::FIRST));
        let fresh = read(board.words(), count(2_000_000, 200_000_000));
        println!("threads: {fresh} fresh values, {} calls", writer.join().unwrap());
        assert!(fresh > 1000);
    });
}

#[test]
fn between_processes_no_word_is_torn_or_stale() {
    let name = format!("waterfill-test-{}-hammer", std::process::id());
    let board = Segment::create(&name, shape(), 1).unwrap();
    let attached = Segment::attach(&name, shape(), 1).unwrap();
    board.unlink().unwrap();
    // The sequence wraps on the way.
    let near = Sequence::from_tag(u32::MAX - 1000).unwrap();
    let writer = process::fork(|| write(attached.words(), near) > 0);
    let reads = count(10_000_000, 1_000_000_000);
    let fresh = read(board.words(), reads);
    assert_eq!(process::wait(writer), 0);
    println!("processes: {reads} reads, {fresh} fresh values");
    assert!(fresh > 1000);
}
