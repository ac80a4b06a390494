//! `train.idx`: where each record of a `.rec` begins. Knows no record.

use std::path::Path;

use super::{
    error::DataError,
    mmap::{Access, MappedFile},
};

/// `train.idx`: a line `key<TAB>offset` a record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Index {
    // Keys are nearly always consecutive: then only the first one is kept, and the offsets.
    keys: Keys,
    offsets: Vec<u64>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Keys {
    From(u64),
    Sorted(Vec<u64>),
}

impl Index {
    /// Reads an index file.
    pub fn open(path: &Path) -> Result<Self, DataError> {
        let map = MappedFile::open(path, Access::Sequential).map_err(|e| DataError::io(path, e))?;
        Self::parse(&map).map_err(|message| DataError::format(path, message))
    }

    /// Reads the lines of an index file. Keys that follow each other, as nearly every file has them, cost 8 bytes a record here and now; only others
    /// are collected and sorted.
    pub fn parse(text: &[u8]) -> Result<Self, String> {
        let mut first = None;
        let mut offsets = Vec::new();
        for entry in entries(text) {
            let (key, offset) = entry?;
            let first = *first.get_or_insert(key);
            if key.checked_sub(first) != Some(offsets.len() as u64) {
                return Self::parse_any_order(text);
            }
            offsets.push(offset);
        }
        Ok(Self {
            keys: Keys::From(first.unwrap_or(0)),
            offsets,
        })
    }

    fn parse_any_order(text: &[u8]) -> Result<Self, String> {
        let mut entries = entries(text).collect::<Result<Vec<_>, _>>()?;
        entries.sort_unstable();
        let twice = entries.windows(2).find_map(|pair| match pair {
            [(a, at), (b, again)] if a == b => {
                Some(format!("key {a} comes twice, at offsets {at} and {again}"))
            }
            _ => None,
        });
        match twice {
            Some(message) => Err(message),
            None => Ok(Self {
                keys: Keys::Sorted(entries.iter().map(|(key, _)| *key).collect()),
                offsets: entries.into_iter().map(|(_, offset)| offset).collect(),
            }),
        }
    }

    /// Records.
    pub fn len(&self) -> usize {
        self.offsets.len()
    }

    /// Whether there is no record.
    pub fn is_empty(&self) -> bool {
        self.offsets.is_empty()
    }

    /// Key of the record at a place in key order.
    pub fn key(&self, place: usize) -> Option<u64> {
        match &self.keys {
            Keys::From(first) => (place < self.len()).then(|| first + place as u64),
            Keys::Sorted(keys) => keys.get(place).copied(),
        }
    }

    /// Offset of a record in the `.rec`, in bytes.
    pub fn offset(&self, key: u64) -> Option<u64> {
        let place = match &self.keys {
            Keys::From(first) => usize::try_from(key.checked_sub(*first)?).ok()?,
            Keys::Sorted(keys) => keys.binary_search(&key).ok()?,
        };
        self.offsets.get(place).copied()
    }

    /// (key, offset) in key order.
    pub fn iter(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.offsets
            .iter()
            .enumerate()
            .filter_map(|(place, &offset)| Some((self.key(place)?, offset)))
    }
}

/// (key, offset) of each line; empty lines count but hold nothing.
fn entries(text: &[u8]) -> impl Iterator<Item = Result<(u64, u64), String>> + '_ {
    let lines = text
        .split(|&byte| byte == b'\n')
        .map(<[u8]>::trim_ascii)
        .zip(1u64..);
    lines.filter(|(line, _)| !line.is_empty()).map(|(line, number)| {
        let entry = || {
            let (key, offset) = std::str::from_utf8(line).ok()?.split_once('\t')?;
            Some((key.trim().parse().ok()?, offset.trim().parse().ok()?))
        };
        entry().ok_or_else(|| {
            let shown = String::from_utf8_lossy(line.get(..40).unwrap_or(line)).into_owned();
            format!("line {number}: {shown:?} is not \"key<TAB>offset\"")
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn an_index_may_have_gaps_and_any_order() {
        let index = Index::parse(b"7\t80\r\n3\t40\n\n5\t0\n").unwrap();
        assert_eq!(index.iter().collect::<Vec<_>>(), [(3, 40), (5, 0), (7, 80)]);
        assert_eq!((index.offset(5), index.offset(4)), (Some(0), None));
        let index = Index::parse(b"0\t0\n1\t40\n").unwrap();
        assert_eq!(index.keys, Keys::From(0));
        assert_eq!(
            (index.offset(1), index.offset(2), index.key(2)),
            (Some(40), None, None)
        );
        assert!(
            Index::parse(b"1\t0\n1\t8\n")
                .unwrap_err()
                .contains("key 1 comes twice")
        );
        assert!(Index::parse(b"1\t0\nx 8\n").unwrap_err().starts_with("line 2"));
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(text in "[0-9]{0,22}[\t ]?[0-9-]{0,22}\n?[0-9]{0,3}[\t]?[0-9]{0,3}", junk: Vec<u8>) {
            for text in [text.as_bytes(), &junk] {
                if let Ok(index) = Index::parse(text) {
                    prop_assert!(index.iter().all(|(key, offset)| index.offset(key) == Some(offset)));
                    prop_assert_eq!(index.iter().count(), index.len());
                }
            }
        }
    }
}
