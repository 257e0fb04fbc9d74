//! A kernel's source, and defects that tests plant in it.

/// What a kernel is compiled from.
#[derive(Clone, Debug)]
pub struct Source {
    /// Files by name and text, in one folder.
    pub files: Vec<(String, String)>,
    /// The text that is compiled: it includes the files, and behind them it defines `extern "C" void call_kernel(const void *args)`,
    /// which each thread of a launch calls.
    pub text: String,
    /// `__CUDA_ARCH__`: 900 for compute capability 9.0.
    pub architecture: u32,
}

/// One edit of a line with a mark.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Edit {
    /// The line ends with `// DEFECT(mark)`.
    pub mark: &'static str,
    /// What is there, once; all of the line if it is empty.
    pub right: &'static str,
    /// What a defective kernel has instead.
    pub wrong: &'static str,
}

/// The line is missing.
#[must_use]
pub const fn without(mark: &'static str) -> Edit {
    Edit { mark, right: "", wrong: "" }
}

/// The line has `wrong` instead of `right`.
#[must_use]
pub const fn instead(mark: &'static str, right: &'static str, wrong: &'static str) -> Edit {
    Edit { mark, right, wrong }
}

/// A defect: edits that make it, and a part of what has to be said of it.
pub type Defect = (&'static [Edit], &'static str);

const START: &str = "  // DEFECT(";

/// The marks of a text.
pub fn marks(text: &str) -> impl Iterator<Item = &str> {
    text.lines().filter_map(mark_of)
}

fn mark_of(line: &str) -> Option<&str> {
    line.rsplit_once(START)?.1.strip_suffix(')')
}

impl Source {
    /// The same with a defect.
    ///
    /// # Panics
    /// Where not exactly one line has the mark, or not once what is to be replaced.
    #[must_use]
    pub fn plant(mut self, edits: &[Edit]) -> Self {
        for edit in edits {
            let marked = self.files.iter().flat_map(|(_, text)| marks(text));
            let count = marked.filter(|mark| *mark == edit.mark).count();
            assert_eq!(count, 1, "lines with the mark DEFECT({})", edit.mark);
            for (_, text) in &mut self.files {
                *text = text.lines().map(|line| edit.of(line) + "\n").collect();
            }
        }
        self
    }
}

impl Edit {
    fn of(&self, line: &str) -> String {
        if mark_of(line) != Some(self.mark) {
            return line.into();
        }
        if self.right.is_empty() {
            return self.wrong.into();
        }
        let count = line.matches(self.right).count();
        assert_eq!(count, 1, "{:?} in the line marked {}: {line}", self.right, self.mark);
        line.replace(self.right, self.wrong)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source() -> Source {
        let text = "a;\nb = c;  // DEFECT(sum)\nd;  // DEFECT(end)\n";
        let files = vec![("one".into(), "a;\n".into()), ("two".into(), text.into())];
        Source { files, text: String::new(), architecture: 900 }
    }

    #[test]
    fn a_defect_changes_its_line_alone() {
        let edits = [instead("sum", "= c", "= 1"), without("end")];
        let files = source().plant(&edits).files;
        assert_eq!(files[0].1, "a;\n");
        assert_eq!(files[1].1, "a;\nb = 1;  // DEFECT(sum)\n\n");
    }

    #[test]
    #[should_panic(expected = "lines with the mark DEFECT(start)")]
    fn a_mark_that_is_missing_is_told() {
        let _ = source().plant(&[without("start")]);
    }

    #[test]
    #[should_panic(expected = "\"= d\" in the line marked sum: b = c;")]
    fn a_piece_that_is_missing_is_told() {
        let _ = source().plant(&[instead("sum", "= d", "= 1")]);
    }
}
