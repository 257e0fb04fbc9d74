//! The text of a shape's kernels: the host's values, then the files of kernels/, each where it is first included.
//!
//! NVRTC could be given the files as named headers. One text is plainer: the cache hashes all of it.

use std::fmt::Write;

use waterfill_board::{BREAK_AFTER, MOST_SELDOM, Outcome};
use waterfill_core::{HALF_TRUSTED, LEAST_TENTHS, bids};

use crate::args::{Args, COUNT, GIVEN, LIVE, MoveArgs, OWN, ReplicaArgs, State};
use crate::shape::{
    BLOCK_BYTES, IdType, LEAST_WARPS, MOST_THREADS, MOVE_THREADS, Shape, Variant, WARP, WeightType,
};

/// The file with the kernels of most shapes. It includes all others that they need.
const EXPAND: &str = "expand.cu";
/// The file with those of a shape with redundant experts. It includes the other one.
const CHOOSE: &str = "choose_replicas.cu";

macro_rules! files {
    ($($name:literal)*) => { [$(($name, include_str!(concat!("../kernels/", $name)))),*] };
}

/// The files of kernels/: name and text.
pub const FILES: [(&str, &str); 12] = files!(
    "assign.cuh" "board.cuh" "choose_replicas.cu" "cluster.cuh" "count.cuh" "expand.cu" "move_up.cuh" "own.cuh" "ptx.cuh"
    "replica_board.cuh" "token.cuh" "types.cuh"
);

/// The source of one of a shape's kernels, which needs no other file.
#[must_use]
pub fn source(shape: &Shape, variant: Variant) -> String {
    let mut text = values(shape, variant);
    include(main_file(shape, variant), &mut Vec::new(), &mut text);
    text + &assertions(shape, variant)
}

/// Whether replicas are chosen by a kernel of it. Calls with quotas from own counts choose none.
fn chooses(shape: &Shape, variant: Variant) -> bool {
    shape.redundant > 0 && !variant.own_only
}

/// The file of kernels/ that includes all others that the kernels need.
pub fn main_file(shape: &Shape, variant: Variant) -> &'static str {
    if chooses(shape, variant) { CHOOSE } else { EXPAND }
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
    let texts = [
        ("ID", id.to_string()),
        ("UNSIGNED_ID", format!("unsigned {id}")),
        ("WEIGHT", weight.into()),
    ];
    let numbers = [
        ("CLUSTERED", variant.clustered.into()),
        ("OWN_ONLY", variant.own_only.into()),
        ("RANKS", shape.ranks as u32),
        ("TOP_K", shape.top_k as u32),
        ("WARP", WARP as u32),
        ("MOST_THREADS", MOST_THREADS as u32),
        ("MOVE_THREADS", MOVE_THREADS as u32),
        ("LEAST_WARPS", LEAST_WARPS as u32),
        ("BLOCK_BYTES", BLOCK_BYTES as u32),
        ("MODE_OWN", OWN),
        ("MODE_LIVE", LIVE),
        ("MODE_GIVEN", GIVEN),
        ("MODE_COUNT", COUNT),
        ("OUTCOMES", Outcome::COUNT as u32),
        ("OUTCOME_LIVE", Outcome::Live as u32),
        ("OUTCOME_NO_PLAN", Outcome::NoPlan as u32),
        ("OUTCOME_TIMED_OUT", Outcome::TimedOut as u32),
        ("OUTCOME_BROKEN", Outcome::Broken as u32),
        ("OUTCOME_TORN", Outcome::Torn as u32),
        ("BREAK_AFTER", BREAK_AFTER),
        ("MOST_SELDOM", MOST_SELDOM),
        ("HALF_TRUSTED", HALF_TRUSTED as u32),
        ("LEAST_TENTHS", LEAST_TENTHS as u32),
        ("ROUNDS", bids::ROUNDS),
        ("BID_LEVELS", bids::BID_LEVELS),
        ("STEP_LEVEL", bids::STEPS[0]),
        ("STEP_TURN", bids::STEPS[1]),
        ("ROUND_LEVEL", bids::ROUND_STEPS[0]),
        ("ROUND_TURN", bids::ROUND_STEPS[1]),
    ];
    let of_replicas = [
        ("REDUNDANT", shape.redundant as u32),
        ("REPLICAS_BYTES", shape.replicas_at(variant.clustered) as u32),
    ];
    let of_replicas = if chooses(shape, variant) { &of_replicas[..] } else { &[] };
    let numbers = numbers.iter().chain(of_replicas);
    let numbers: Vec<_> = numbers.map(|(name, value)| (*name, format!("{value}u"))).collect();
    let lines = texts.iter().chain(&numbers);
    lines.map(|(name, value)| format!("#define {name} {value}\n")).collect()
}

/// What the compiler finds to be so, or refuses: that the structs of the kernels are those of the host, and their arrays in shared
/// memory those that it leaves room for. NVRTC has no `offsetof`: each field is for the compiler of the tests without a GPU.
pub fn assertions(shape: &Shape, variant: Variant) -> String {
    let mut arrays = vec![
        format!("sizeof(Zeros) == {}", shape.zero_bytes(variant.clustered)),
        format!("sizeof(PerRank) == {}", shape.per_rank_bytes()),
        format!("Visits::WORDS == {}", shape.visit_words()),
    ];
    let mut structs = vec![Args::LAYOUT, MoveArgs::LAYOUT, State::LAYOUT];
    if chooses(shape, variant) {
        arrays.push(format!("sizeof(Replicas) == {}", shape.replicas_bytes()));
        structs.push(ReplicaArgs::LAYOUT);
    }
    let structs = structs.iter().map(|layout| layout.claims());
    let (structs, fields): (Vec<_>, Vec<_>) = structs.unzip();
    let assert = |claim: &String| format!("static_assert({claim}, \"as on the host\");\n");
    let sizes: String = structs.iter().chain(&arrays).map(assert).collect();
    let fields: String = fields.iter().flatten().map(assert).collect();
    format!("{sizes}#ifndef __CUDACC_RTC__\n{fields}#endif\n")
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
    let line_is = |text: &mut String, line: usize| {
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
        let text = source(&shape(4), Variant { clustered: true, own_only: false });
        assert!(!text.contains("#include") && !text.contains("#pragma once"));
        for (name, file) in FILES {
            assert_eq!(text.matches(&format!("#line 1 \"{name}\"\n")).count(), 1, "{name}");
            let last = file.trim_end().rsplit("\n\n").next().expect("text has a last part");
            assert_eq!(text.matches(last).count(), 1, "the last lines of {name}");
        }
    }

    fn shape(redundant: usize) -> Shape {
        let (id, weight) = (IdType::I32, WeightType::F32);
        Shape { ranks: 8, experts: 16, redundant, top_k: 6, id, weight }
    }

    #[test]
    fn what_chooses_replicas_is_where_some_are_redundant_and_nowhere_else() {
        for clustered in [false, true] {
            let any = |redundant| source(&shape(redundant), Variant { clustered, own_only: false });
            let (without, with) = (any(0), any(4));
            assert!(!without.to_lowercase().contains("redundant"));
            assert!(!without.contains("choose_replicas") && with.contains("choose_replicas"));
            // What is in both is the same text.
            let kernels = |text: &str| text[text.find("#line 1").unwrap()..].to_string();
            let expand = kernels(&without);
            let expand = &expand[..expand.find("static_assert(sizeof(Args)").unwrap()];
            assert!(kernels(&with).contains(expand));
            let own = |redundant| source(&shape(redundant), Variant { clustered, own_only: true });
            assert_eq!(own(0), own(4));
        }
    }
}
