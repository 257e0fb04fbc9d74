//! The header of a segment: written once, by its creator, and checked by everybody else before anything is used.

use std::path::Path;

use crate::error::{Result, check_field};
use crate::layout::{HEADER, Shape};
use crate::sync::{AtomicU64, Ordering};

/// "wfboard" and the layout's version: raised whenever a word means something else.
pub(crate) const MAGIC: u64 = u64::from_be_bytes(*b"wfboard\x05");
/// The header's words, in order.
const FIELDS: [&str; 6] =
    ["ranks", "experts", "redundant", "words", "run token, low", "run token, high"];

/// Write the header of a fresh segment, for everybody who knows `run`.
pub(crate) fn write(words: &[AtomicU64], shape: Shape, run: u128) {
    for (word, value) in words[1..].iter().zip(fields(shape, run)) {
        // Relaxed: published by the magic below.
        word.store(value, Ordering::Relaxed);
    }
    // Release: who finds the magic finds the fields. Partner: the acquire in `check`.
    words[0].store(MAGIC, Ordering::Release);
}

/// The shape that a header tells, if header and size fit it.
pub(crate) fn shape_of(words: &[AtomicU64], path: &Path) -> Result<Shape> {
    let bytes_there = size_of_val(words) as u64;
    if words.len() < HEADER {
        check_field(path, "size in bytes", bytes_there, (HEADER * size_of::<AtomicU64>()) as u64)?;
    }
    // Acquire: as in `check`.
    check_field(path, "magic and version", words[0].load(Ordering::Acquire), MAGIC)?;
    // Relaxed: ordered by the acquire above.
    let field = |word: usize| words[word].load(Ordering::Relaxed) as usize;
    let shape = Shape::with_redundant(field(1), field(2), field(3))?;
    check_field(path, "size in bytes", bytes_there, shape.bytes() as u64)?;
    check(words, shape, None, path)?;
    Ok(shape)
}

/// A header is of this shape, and of this run where one is given.
pub(crate) fn check(
    words: &[AtomicU64],
    shape: Shape,
    run: Option<u128>,
    path: &Path,
) -> Result<()> {
    // Acquire: the fields were written before it. Partner: the release in `write`.
    check_field(path, "magic and version", words[0].load(Ordering::Acquire), MAGIC)?;
    let known = if run.is_some() { FIELDS.len() } else { FIELDS.len() - 2 };
    let fields = FIELDS.into_iter().zip(&words[1..]).zip(fields(shape, run.unwrap_or(0)));
    for ((field, word), value) in fields.take(known) {
        // Relaxed: ordered by the acquire above.
        check_field(path, field, word.load(Ordering::Relaxed), value)?;
    }
    Ok(())
}

fn fields(shape: Shape, run: u128) -> [u64; FIELDS.len()] {
    const { assert!(FIELDS.len() < HEADER) };
    let Shape { ranks, experts, redundant } = shape;
    let sizes = [ranks, experts, redundant, shape.words()].map(|size| size as u64);
    let [ranks, experts, redundant, words] = sizes;
    [ranks, experts, redundant, words, run as u64, (run >> 64) as u64]
}
