//! Writes new sets: images of other sets byte for byte, or images that are made from files; many are read at a time, written
//! in their order. Memory holds some thousand images, whatever the set's size.

use super::{
    DataError, Dataset, Image,
    decode::{self, SIDE},
    duplicates::{self, Hashes},
    identities, read_pixels,
    record_set::RecordSet,
    recordio_write::{LayoutWriter, write_atomically},
};
use rayon::prelude::*;
use std::{borrow::Cow, path::Path};

/// Images read between two writes.
const CHUNK: usize = 1024;

/// An image of a new set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pick {
    /// Which of the old sets it is in.
    pub set: u32,
    /// Its identity in the new one.
    pub label: u32,
    /// Its place in the old one.
    pub index: u64,
}

/// Looks at every image, many at a time, and hands on what was found in their order.
pub fn in_order<T: Send, E>(
    images: u64,
    look: impl Fn(u64) -> T + Sync,
    mut take: impl FnMut(u64, T) -> Result<(), E>,
) -> Result<(), E> {
    for first in (0..images).step_by(4 * CHUNK) {
        let end = images.min(first + 4 * CHUNK as u64);
        let found: Vec<T> = (first..end).into_par_iter().map(&look).collect();
        for (image, found) in (first..).zip(found) {
            take(image, found)?;
        }
    }
    Ok(())
}

/// What is looked for in every image before a set is copied.
#[derive(Clone, Copy, Debug, Default)]
pub struct Look {
    /// Decode it.
    pub decode: bool,
    /// Hash its bytes.
    pub hash: bool,
    /// Leave damaged ones out instead of stopping.
    pub skip_damaged: bool,
}

/// The labels of a set's images; nothing for those that are left out.
#[derive(Debug, Default)]
pub struct Survey {
    /// By image.
    pub labels: Vec<Option<u32>>,
    /// Damaged images.
    pub damaged: u64,
}

impl Survey {
    /// Identities of the set, which says so or shows it.
    pub fn classes(&self, set: &RecordSet) -> u32 {
        match set.num_classes() {
            u32::MAX => self.labels.iter().flatten().max().map_or(0, |&label| label + 1),
            known => known,
        }
    }
}

/// Looks through a set. Hashes go to `hashes`, under the image's number in the set and `first` more.
pub fn survey(
    set: &RecordSet,
    look: Look,
    first: u64,
    hashes: &mut Hashes,
    done: &mut dyn FnMut(),
) -> Result<Survey, DataError> {
    let mut found = Survey::default();
    let see = |index: u64| -> Result<(u32, u64), DataError> {
        if look.decode {
            read_pixels(set, index, &mut [0; decode::PIXEL_BYTES])?;
        }
        let record = set.record(index)?;
        // Where no header says how many identities there are, a label alone may not cost memory.
        if set.num_classes() == u32::MAX && u64::from(record.label) >= set.len() {
            let message = format!("label {} is not below the number of images", record.label);
            return Err(DataError::record(set.name(index), message));
        }
        let hash = match &record.image {
            Image::Encoded(bytes, _) if look.hash => duplicates::hash(bytes),
            _ => 0,
        };
        Ok((record.label, hash))
    };
    in_order(set.len(), see, |index, seen| {
        done();
        match seen {
            Ok((label, hash)) => {
                found.labels.push(Some(label));
                if look.hash {
                    hashes.push(first + index, hash);
                }
            }
            Err(_) if look.skip_damaged => {
                found.labels.push(None);
                found.damaged += 1;
            }
            Err(error) => return Err(error),
        }
        Ok(())
    })?;
    Ok(found)
}

/// The stored bytes of an image.
pub fn bytes(set: &dyn Dataset, index: u64) -> Result<Cow<'_, [u8]>, DataError> {
    match set.record(index)?.image {
        Image::Encoded(bytes, _) => Ok(bytes),
        Image::Pixels(_) => Err(DataError::record(
            set.name(index),
            "the image is not stored as a file",
        )),
    }
}

/// Whether two images are the same file; images that cannot be read are not.
pub fn same_bytes(set: &dyn Dataset, a: u64, other: &dyn Dataset, b: u64) -> bool {
    matches!((bytes(set, a), bytes(other, b)), (Ok(a), Ok(b)) if a == b)
}

/// Appends images of other sets as they are. Every one must have the training size.
pub fn copy(
    sets: &[RecordSet],
    picks: &[Pick],
    writer: &mut LayoutWriter,
    done: &mut dyn FnMut(u64),
) -> Result<(), DataError> {
    for chunk in picks.chunks(CHUNK) {
        let read: Vec<Cow<'_, [u8]>> = chunk
            .par_iter()
            .map(|pick| {
                let set = &sets[pick.set as usize];
                let image = bytes(set, pick.index)?;
                let refuse = |message: String| DataError::record(set.name(pick.index), message);
                match decode::dimensions(&image).map_err(refuse)? {
                    (width, height) if (width, height) == (SIDE as u32, SIDE as u32) => Ok(image),
                    (width, height) => Err(refuse(format!(
                        "the image is {width}x{height}, not {SIDE}x{SIDE}"
                    ))),
                }
            })
            .collect::<Result<_, _>>()?;
        for (pick, image) in chunk.iter().zip(&read) {
            writer.write(pick.label, image)?;
        }
        done(chunk.len() as u64);
    }
    Ok(())
}

/// Appends images that are made of `items`, which lie in the order of their labels. An item that cannot be made goes to
/// `refused`, which may stop or leave it out. New labels are 0, 1, 2, ...; the old ones are returned by them, those of items
/// before these first. `done` hears of items of which all is written.
pub fn make<T: Sync, E: Send + From<DataError>>(
    items: &[T],
    mut labels: Vec<u32>,
    label: impl Fn(&T) -> u32,
    image: impl Fn(&T) -> Result<Vec<u8>, E> + Sync,
    refused: &mut dyn FnMut(&T, E) -> Result<(), E>,
    writer: &mut LayoutWriter,
    done: &mut dyn FnMut(u64, &mut LayoutWriter) -> Result<(), E>,
) -> Result<Vec<u32>, E> {
    for chunk in items.chunks(CHUNK) {
        let made: Vec<Result<Vec<u8>, E>> = chunk.par_iter().map(&image).collect();
        for (item, made) in chunk.iter().zip(made) {
            match made {
                Ok(bytes) => {
                    if labels.last() != Some(&label(item)) {
                        labels.push(label(item));
                    }
                    let dense = labels.len() as u32 - 1;
                    writer.write(dense, &bytes)?;
                }
                Err(error) => refused(item, error)?,
            }
        }
        done(chunk.len() as u64, writer)?;
    }
    Ok(labels)
}

/// What [`make`] did with items of these labels of which those at `refused` (in order) were left out: old labels by new ones, and
/// images of each.
pub fn made(labels: impl Iterator<Item = u32>, refused: &[u64]) -> (Vec<u32>, Vec<u64>) {
    let mut refused = refused.iter().copied().peekable();
    let (mut old, mut images): (Vec<u32>, Vec<u64>) = Default::default();
    for (item, label) in (0..).zip(labels) {
        if refused.next_if_eq(&item).is_some() {
            continue;
        }
        if old.last() != Some(&label) {
            old.push(label);
            images.push(0);
        }
        if let Some(images) = images.last_mut() {
            *images += 1;
        }
    }
    (old, images)
}

/// Writes what lies beside a set (`property`, as InsightFace has it, and the identities' names), then gives the set its
/// name: a set that is there is whole.
pub fn finish(writer: LayoutWriter, rec: &Path, names: Option<&[String]>) -> Result<(), DataError> {
    if writer.images() == 0 {
        let message = "no image is left, and an empty set is not written";
        return Err(DataError::format(rec, message));
    }
    let property = format!("{},{SIDE},{SIDE}\n", writer.identities());
    write_atomically(&rec.with_file_name("property"), property.as_bytes())?;
    let path = identities::path_of(rec);
    match names {
        Some(names) => {
            let text = identities::format(names).map_err(|message| DataError::format(&path, message))?;
            write_atomically(&path, text.as_bytes())?;
        }
        // Those of an old set in this place.
        None => match std::fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(DataError::io(&path, error));
            }
            _ => {}
        },
    }
    writer.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_are_handed_on_in_order_until_one_stops() {
        let mut seen = Vec::new();
        let images = 9 * CHUNK as u64 + 3;
        let all = in_order(
            images,
            |image| image * 2,
            |image, found| {
                assert_eq!(found, image * 2);
                seen.push(image);
                Ok::<(), ()>(())
            },
        );
        assert_eq!((all, seen.len() as u64), (Ok(()), images));
        assert!(seen.is_sorted());
        let mut looked = 0;
        let stopped = in_order(
            images,
            |image| image,
            |image, _| {
                looked += 1;
                if image == 5 { Err("five") } else { Ok(()) }
            },
        );
        assert_eq!((stopped, looked), (Err("five"), 6));
    }

    #[test]
    fn what_cannot_be_made_leaves_no_gap() {
        let dir = tempfile::tempdir().unwrap();
        let rec = dir.path().join("train.rec");
        let mut writer = LayoutWriter::open_ended(&rec).unwrap();
        let items = [(3, 1), (3, 0), (5, 0), (9, 1), (9, 1)];
        let mut refused = Vec::new();
        let labels = make(
            &items,
            Vec::new(),
            |item| item.0,
            |item| match item.1 {
                1 => Ok(vec![b'x'; item.0 as usize]),
                _ => Err(DataError::record("item", "bad")),
            },
            &mut |item, _| {
                refused.push(*item);
                Ok(())
            },
            &mut writer,
            &mut |_, _| Ok(()),
        )
        .unwrap();
        assert_eq!((labels, refused), (vec![3, 9], vec![(3, 0), (5, 0)]));
        assert_eq!(
            made(items.iter().map(|item| item.0), &[1, 2]),
            (vec![3, 9], vec![1, 2])
        );
        let names = ["three".to_owned(), "nine".to_owned()];
        finish(writer, &rec, Some(&names)).unwrap();
        let set = RecordSet::open(&rec, None).unwrap();
        assert_eq!((set.len(), set.num_classes()), (3, 2));
        assert_eq!(identities::read(&rec, 2).unwrap().unwrap(), names);
        let property = std::fs::read_to_string(dir.path().join("property")).unwrap();
        assert_eq!(property, "2,112,112\n");
    }
}
