//! Memory that is asked for once, at the first problem of a size: which lists a problem fills, and how far, depends on its counts.

/// Make room for `most` entries, of which none is asked for later.
pub(crate) fn hold<T>(list: &mut Vec<T>, most: usize) {
    if list.capacity() < most {
        list.reserve_exact(most - list.len());
    }
}
