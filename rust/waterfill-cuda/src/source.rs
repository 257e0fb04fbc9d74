//! The text of a shape's kernels: the host's values, then the files of kernels/, each where it is first included.
//!
//! NVRTC could be given the files as named headers. One text is plainer: the cache hashes all of it.

use std::fmt::Write;

use waterfill_core::bids;

use crate::shape::{BLOCK_BYTES, IdType, LEAST_WARPS, MOVE_THREADS, Shape, Variant, WeightType};

/// The file with the kernels. It includes all others.
pub const MAIN: &str = "expand.cu";

macro_rules! files {
    ($($name:literal)*) => { [$(($name, include_str!(concat!("../kernels/", $name)))),*] };
}

/// The files of kernels/: name and text.
pub const FILES: [(&str, &str); 10] = files!(
    "assign.cuh" "board.cuh" "cluster.cuh" "count.cuh" "expand.cu" "move_up.cuh" "own.cuh" "ptx.cuh" "token.cuh" "types.cuh"
);

/// The source of one of a shape's kernels, which needs no other file.
#[must_use]
pub fn source(shape: &Shape, variant: Variant) -> String {
    let mut text = values(shape, variant);
    include(MAIN, &mut Vec::new(), &mut text);
    text
}

/// What the host decides, as macros.
pub fn values(shape: &Shape, variant: Variant) -> String {
    let id = match shape.id {
        IdType::I32 => "int",
        IdType::I64 => "long long",
    };
    let weight = match shape.weight {
        WeightType::F32 => "unsigned",
        WeightType::Bf16 => "unsigned short",
    };
    let (steps, more) = (bids::STEPS, bids::ROUND_STEPS);
    let values = [
        ("CLUSTERED", u32::from(variant.clustered).to_string()),
        ("OWN_ONLY", u32::from(variant.own_only).to_string()),
        ("RANKS", format!("{}u", shape.ranks)),
        ("TOP_K", format!("{}u", shape.top_k)),
        ("ID", id.into()),
        ("UNSIGNED_ID", format!("unsigned {id}")),
        ("WEIGHT", weight.into()),
        ("MOVE_THREADS", format!("{MOVE_THREADS}u")),
        ("BLOCK_BYTES", format!("{BLOCK_BYTES}u")),
        ("LEAST_WARPS", format!("{LEAST_WARPS}u")),
        ("ROUNDS", format!("{}u", bids::ROUNDS)),
        ("BID_LEVELS", format!("{}u", bids::BID_LEVELS)),
        ("STEP_LEVEL", format!("{}u", steps[0])),
        ("STEP_TURN", format!("{}u", steps[1])),
        ("ROUND_LEVEL", format!("{}u", more[0])),
        ("ROUND_TURN", format!("{}u", more[1])),
    ];
    values.map(|(name, value)| format!("#define {name} {value}\n")).concat()
}

/// Append the file `name` to `text`. A file that it includes stands in the place of the first `#include`, and nothing in that of the
/// others. The compiler's messages name each file and its lines.
fn include(name: &str, included: &mut Vec<&'static str>, text: &mut String) {
    let found = FILES.iter().find(|(file, _)| *file == name);
    let (name, file) = found.unwrap_or_else(|| panic!("kernels/ has no {name}"));
    if included.contains(name) {
        return;
    }
    included.push(name);
    let mut line_is = |text: &mut String, line: usize| {
        writeln!(text, "#line {line} \"{name}\"").expect("a String takes what is written");
    };
    line_is(text, 1);
    for (i, line) in file.lines().enumerate() {
        if let Some(other) = line.strip_prefix("#include ") {
            include(other.trim_matches('"'), included, text);
            line_is(text, i + 2);
        } else {
            // Here each file is once, and NVRTC may warn of it outside a header.
            text.push_str(if line == "#pragma once" { "" } else { line });
            text.push('\n');
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_file_is_in_it_once() {
        let shape =
            Shape { ranks: 8, experts: 16, top_k: 6, id: IdType::I32, weight: WeightType::F32 };
        let text = source(&shape, Variant { clustered: true, own_only: false });
        assert!(!text.contains("#include") && !text.contains("#pragma once"));
        for (name, file) in FILES {
            assert_eq!(text.matches(&format!("#line 1 \"{name}\"\n")).count(), 1, "{name}");
            let last = file.trim_end().rsplit("\n\n").next().expect("text has a last part");
            assert_eq!(text.matches(last).count(), 1, "the last lines of {name}");
        }
    }
}
