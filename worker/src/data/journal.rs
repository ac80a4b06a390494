//! The journal of a set that is being written: how far its files are on the disk, so that a run that is broken off can be gone
//! on with. It lies beside the files as `.journal` until the set is whole.
//!
//! The first line says what is made, as a digest of all that decides it. Each further line is a mark: items that are done,
//! bytes of the `.rec` and the `.idx` with them, items that were left out since the line before, and a digest of the line.
//! A mark is written when its bytes are on the disk. A line that is torn or changed ends the journal before it.

use super::error::DataError;
use std::{
    fs::{File, OpenOptions, TryLockError},
    io::{Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

/// Begins the first line.
const FORMAT: &str = "arcface pack 1";

/// How far the files of a set are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Mark {
    /// Items that are done, with those that were left out.
    pub items: u64,
    /// Bytes of the `.rec`.
    pub rec: u64,
    /// Bytes of the `.idx`.
    pub idx: u64,
}

/// What an earlier run of the same command left.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Earlier {
    /// How far it came.
    pub mark: Mark,
    /// Items up to there that were left out, in order.
    pub refused: Vec<u64>,
}

/// An open journal. No other process can open it meanwhile. Without a mark its file goes with it.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    file: File,
    /// There is a mark to go on from.
    marked: bool,
}

impl Journal {
    /// Where the journal of a `.rec` lies.
    pub fn path_of(rec: &Path) -> PathBuf {
        rec.with_extension("journal")
    }

    /// Opens the journal of `rec`. What an earlier run of the same `purpose` left is given; of another purpose it is forgotten.
    ///
    /// # Errors
    /// If another process writes the same set, or the file cannot be used.
    pub fn open(rec: &Path, purpose: &str) -> Result<(Self, Option<Earlier>), DataError> {
        let path = Self::path_of(rec);
        let failed = |error| DataError::io(&path, error);
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(failed)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let message = "another process is writing this set";
                return Err(DataError::format(rec, message));
            }
            Err(TryLockError::Error(error)) => return Err(failed(error)),
        }
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).map_err(failed)?;
        let head = format!("{FORMAT} {purpose}\n");
        let (kept, earlier) = match bytes.strip_prefix(head.as_bytes()) {
            Some(lines) => {
                let (length, earlier) = read(lines);
                (head.len() + length, earlier)
            }
            None => (0, Earlier::default()),
        };
        file.set_len(kept as u64)
            .and_then(|()| file.seek(SeekFrom::End(0)))
            .and_then(|_| {
                if kept == 0 {
                    file.write_all(head.as_bytes())
                } else {
                    Ok(())
                }
            })
            .map_err(failed)?;
        let earlier = Some(earlier).filter(|earlier| earlier.mark.items > 0);
        let marked = earlier.is_some();
        Ok((Self { path, file, marked }, earlier))
    }

    /// Notes a mark, and the items that were left out since the one before.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn note(&mut self, mark: &Mark, refused: &[u64]) -> Result<(), DataError> {
        self.file
            .write_all(line(mark, refused).as_bytes())
            .and_then(|()| self.file.sync_data())
            .map_err(|error| DataError::io(&self.path, error))?;
        self.marked = true;
        Ok(())
    }

    /// Whether there is a mark to go on from.
    pub fn is_marked(&self) -> bool {
        self.marked
    }

    /// The set is whole: there is nothing to go on with any more.
    pub fn done(mut self) {
        self.marked = false;
    }
}

impl Drop for Journal {
    fn drop(&mut self) {
        if !self.marked {
            // Best effort: one that stays is of files that are not there, and the next run begins again.
            std::fs::remove_file(&self.path).unwrap_or_default();
        }
    }
}

fn line(mark: &Mark, refused: &[u64]) -> String {
    let refused: Vec<String> = refused.iter().map(u64::to_string).collect();
    let text = format!(
        "{}\t{}\t{}\t{}",
        mark.items,
        mark.rec,
        mark.idx,
        refused.join(",")
    );
    format!("{text}\t{}\n", digest(&text))
}

fn digest(text: &str) -> String {
    blake3::hash(text.as_bytes()).to_hex().chars().take(16).collect()
}

/// What the lines say, and how many bytes of them are whole.
fn read(mut lines: &[u8]) -> (usize, Earlier) {
    let (mut length, mut earlier) = (0, Earlier::default());
    while let Some(end) = lines.iter().position(|byte| *byte == b'\n') {
        let (first, rest) = lines.split_at(end + 1);
        let Some((mark, refused)) = parse(&first[..end]) else {
            break;
        };
        earlier.mark = mark;
        earlier.refused.extend(refused);
        length += first.len();
        lines = rest;
    }
    (length, earlier)
}

fn parse(line: &[u8]) -> Option<(Mark, Vec<u64>)> {
    let (text, sum) = std::str::from_utf8(line).ok()?.rsplit_once('\t')?;
    if digest(text) != sum {
        return None;
    }
    let fields: Vec<&str> = text.split('\t').collect();
    let [items, rec, idx, refused] = fields[..] else {
        return None;
    };
    let mark = Mark {
        items: items.parse().ok()?,
        rec: rec.parse().ok()?,
        idx: idx.parse().ok()?,
    };
    let refused = refused.split(',').filter(|item| !item.is_empty());
    Some((
        mark,
        refused.map(|item| item.parse().ok()).collect::<Option<_>>()?,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn mark(items: u64) -> Mark {
        Mark {
            items,
            rec: items * 100,
            idx: items * 7,
        }
    }

    fn noted(rec: &Path, marks: &[(u64, &[u64])]) {
        let (mut journal, _) = Journal::open(rec, "faces").unwrap();
        for (items, refused) in marks {
            journal.note(&mark(*items), refused).unwrap();
        }
    }

    #[test]
    fn what_was_noted_is_found_by_the_same_purpose_alone() {
        let dir = tempfile::tempdir().unwrap();
        let rec = dir.path().join("train.rec");
        assert_eq!(Journal::open(&rec, "faces").unwrap().1, None);
        noted(&rec, &[(10, &[3]), (20, &[]), (30, &[22, 25])]);
        let (journal, earlier) = Journal::open(&rec, "faces").unwrap();
        let known = Earlier {
            mark: mark(30),
            refused: vec![3, 22, 25],
        };
        assert_eq!(earlier, Some(known));
        let busy = Journal::open(&rec, "faces").unwrap_err().to_string();
        assert!(busy.contains("another process is writing this set"), "{busy}");
        drop(journal);
        assert_eq!(Journal::open(&rec, "others").unwrap().1, None);
        assert_eq!(Journal::open(&rec, "faces").unwrap().1, None, "forgotten");
        assert!(!Journal::path_of(&rec).exists(), "one without a mark is gone");
        noted(&rec, &[(10, &[])]);
        Journal::open(&rec, "faces").unwrap().0.done();
        assert!(!Journal::path_of(&rec).exists());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(256))]
        /// Whatever happens to the file, what is read of it are the first of its marks.
        #[test]
        fn damage_takes_marks_from_the_end(at in 0usize..400, to in any::<Option<u8>>()) {
            let dir = tempfile::tempdir().unwrap();
            let rec = dir.path().join("train.rec");
            let all: [(u64, &[u64]); 4] = [(1000, &[5, 7]), (2000, &[]), (3000, &[2999]), (4000, &[])];
            noted(&rec, &all);
            let path = Journal::path_of(&rec);
            let mut bytes = std::fs::read(&path).unwrap();
            let at = at % bytes.len();
            match to {
                Some(to) => bytes[at] = to,
                None => bytes.truncate(at),
            }
            std::fs::write(&path, &bytes).unwrap();
            let (mut journal, found) = Journal::open(&rec, "faces").unwrap();
            let whole = found.clone().map_or(0, |earlier| earlier.mark.items / 1000);
            let expected: Vec<u64> = all[..whole as usize].iter().flat_map(|(_, refused)| *refused).copied().collect();
            let found = found.unwrap_or_default();
            prop_assert_eq!(&found.refused, &expected);
            prop_assert!(found.mark == Mark::default() || found.mark == mark(found.mark.items));
            // It goes on behind them.
            journal.note(&mark(9000), &[8999]).unwrap();
            drop(journal);
            let again = Journal::open(&rec, "faces").unwrap().1.unwrap();
            prop_assert_eq!(again.mark, mark(9000));
            prop_assert_eq!(again.refused, [&expected[..], &[8999]].concat());
        }
    }
}
