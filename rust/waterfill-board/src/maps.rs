//! The replicas of each layer, as the planner knows them.

use std::sync::Arc;
use std::sync::mpsc::Receiver;

use waterfill_core::ReplicaTable;

/// One table a layer, found by the fingerprint that ranks post.
#[derive(Debug, Default)]
pub(crate) struct Maps {
    tables: Vec<Option<Arc<ReplicaTable>>>,
    /// The layer that was found last: the next call is most often of the one behind it.
    last: usize,
}

/// A map that a thread sends to the planner's: a layer, and its table from now on.
pub(crate) type NewMap = (usize, Arc<ReplicaTable>);

impl Maps {
    /// From now on `layer` has this table.
    pub(crate) fn set(&mut self, layer: usize, table: Arc<ReplicaTable>) {
        if self.tables.len() <= layer {
            self.tables.resize(layer + 1, None);
        }
        self.tables[layer] = Some(table);
    }

    /// Take what was sent.
    pub(crate) fn take(&mut self, sent: &Receiver<NewMap>) {
        for (layer, table) in sent.try_iter() {
            self.set(layer, table);
        }
    }

    /// A table with this fingerprint, whichever layer's: plans depend on nothing else of a layer.
    pub(crate) fn find(&mut self, fingerprint: u32) -> Option<Arc<ReplicaTable>> {
        let layers = self.tables.len();
        let found = (1..=layers).map(|step| (self.last + step) % layers).find(|&layer| {
            self.tables[layer].as_ref().is_some_and(|table| table.fingerprint() == fingerprint)
        })?;
        self.last = found;
        self.tables[found].clone()
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;

    #[test]
    fn tables_are_found_by_fingerprint_until_they_are_replaced() {
        let table = |map: &[u32]| Arc::new(ReplicaTable::new(2, map).unwrap());
        let (first, second) = (table(&[0, 1, 0, 2]), table(&[0, 1, 1, 2]));
        let mut maps = Maps::default();
        assert_eq!(maps.find(first.fingerprint()), None);
        maps.set(3, Arc::clone(&first));
        maps.set(1, Arc::clone(&second));
        for table in [&first, &second, &first] {
            assert_eq!(maps.find(table.fingerprint()).as_ref(), Some(table));
        }
        // Another thread sends one.
        let (sender, sent) = std::sync::mpsc::channel();
        sender.send((3, Arc::clone(&second))).unwrap();
        maps.take(&sent);
        assert_eq!(maps.find(first.fingerprint()), None);
        assert_eq!(maps.find(second.fingerprint()), Some(second));
    }
}
