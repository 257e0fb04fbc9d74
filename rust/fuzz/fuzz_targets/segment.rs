//! Any bytes as a segment's file: attaching never panics, and accepts only the header that this shape and run have.
#![no_main]

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;

use libfuzzer_sys::fuzz_target;
use waterfill_board::{Observer, Region, Shape, Segment};

const RUN: u128 = 0x1234_5678_9abc_def0_0fed_cba9_8765_4321;

/// The bytes of a whole board's header, for the fuzzer to start from.
fn header(shape: Shape) -> Vec<u8> {
    let name = format!("waterfill-fuzz-{}-whole", std::process::id());
    let board = Segment::create(&name, shape, RUN).unwrap();
    board.unlink().unwrap();
    let words = board.words()[..6].iter();
    words.flat_map(|word| word.load(std::sync::atomic::Ordering::Relaxed).to_ne_bytes()).collect()
}

/// The first byte says how the others become a file: as they are, or laid over a whole board's header.
fn file_of(data: &[u8], shape: Shape, whole: &[u8]) -> Vec<u8> {
    let Some((&how, bytes)) = data.split_first() else { return vec![] };
    if how & 1 == 0 {
        return bytes.to_vec();
    }
    let mut file = vec![0; shape.words() * 8];
    file[..whole.len()].copy_from_slice(whole);
    for (at, &change) in file.iter_mut().zip(bytes) {
        *at ^= change;
    }
    file.truncate(file.len() - usize::from(how >> 1) / 64);
    file
}

fuzz_target!(|data: &[u8]| {
    let shape = Shape::new(1, 1).unwrap();
    let whole = header(shape);
    let bytes = file_of(data, shape, &whole);
    let name = format!("waterfill-fuzz-{}", std::process::id());
    let path = format!("/dev/shm/{name}");
    let mut file = File::options().write(true).create_new(true).mode(0o600).open(&path).unwrap();
    // A board without a lock is taken away by whoever of this user creates one meanwhile.
    file.lock().unwrap();
    file.write_all(&bytes).unwrap();
    let fits = bytes.len() == shape.words() * 8 && bytes[..48] == whole[..];
    assert_eq!(Segment::attach(&name, shape, RUN).is_ok(), fits);
    if let Ok(seen) = Observer::attach(path.as_ref()) {
        let snapshot = seen.snapshot();
        assert_eq!(snapshot.shape.words() * 8, bytes.len());
        assert_eq!(bytes[..8], whole[..8]);
    }
    assert_eq!(fs::read(&path).unwrap(), bytes, "written to");
    fs::remove_file(&path).unwrap();
});
