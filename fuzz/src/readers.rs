//! Every reader of bytes that come from elsewhere, as a function of bytes that may be any: it must give a value or a
//! typed error, never a panic, and what it accepts must keep its promises. Shared by the fuzz targets and by the tests
//! that replay their corpora, whose crate roots name the modules of the worker.

use std::path::Path;

use crate::{
    checkpoint::manifest as manifests,
    data::{decode, pickle as pickles, record_index::Index, recordio as records},
    eval::VerificationSet,
    export::{
        pytorch::state_dict::{self, StateDict},
        safetensors::header,
    },
};

/// A reader by the name of its target; it says whether it took the bytes for what they should be.
pub type Reader = (&'static str, fn(&[u8]) -> bool);

/// All of them.
pub const READERS: [Reader; 9] = [
    ("recordio", recordio),
    ("idx", idx),
    ("pickle_bin", pickle_bin),
    ("pickle_pt", pickle_pt),
    ("pt_zip", pytorch),
    ("pt_legacy", pytorch),
    ("safetensors", safetensors),
    ("jpeg_record", jpeg_record),
    ("manifest", manifest),
];

/// The bytes of a `.rec` file, read from several places; the first one counts.
pub fn recordio(bytes: &[u8]) -> bool {
    let read = |offset| match records::record_at(bytes, offset) {
        Ok(record) => {
            assert!(!record.labels.is_empty());
            assert!(record.body.len() <= bytes.len());
            true
        }
        Err(what) => {
            assert!(!what.is_empty());
            false
        }
    };
    let others = [4, bytes.len() as u64 / 2, u64::MAX].map(read);
    read(0) && !others[2]
}

/// A `train.idx`.
pub fn idx(bytes: &[u8]) -> bool {
    let Ok(index) = Index::parse(bytes) else {
        return false;
    };
    assert_eq!(index.iter().count(), index.len());
    assert!(
        index
            .iter()
            .all(|(key, offset)| index.offset(key) == Some(offset))
    );
    true
}

/// A verification set.
pub fn pickle_bin(bytes: &[u8]) -> bool {
    let Ok(set) = VerificationSet::parse(Path::new("set.bin"), bytes) else {
        return false;
    };
    assert_eq!(set.len(), 2 * set.pairs());
    assert!((0..set.len()).all(|image| set.encoded(image).is_some()));
    true
}

/// The pickle of a PyTorch file, alone and in an archive with checksums that fit.
pub fn pickle_pt(bytes: &[u8]) -> bool {
    if let Ok(pickle) = pickles::read(bytes, &[], &pickles::Limits::default()) {
        assert!(pickle.consumed() <= bytes.len());
    }
    pytorch(&archive(&[
        ("a/data.pkl", bytes),
        ("a/data/0", &[0; 48]),
        ("a/data/1", &[1; 8]),
    ]))
}

/// A file of `torch.save`, of either form.
pub fn pytorch(bytes: &[u8]) -> bool {
    let read = |keys: &[&str]| match state_dict::read(bytes, keys) {
        Ok(read) => {
            inside(&read, bytes);
            true
        }
        Err(refused) => {
            assert!(!refused.what.is_empty() && !refused.what.contains('\n'));
            false
        }
    };
    let head = read(&state_dict::HEAD);
    read(&state_dict::NETWORK) || head
}

/// Storages are pieces of the file and take no more than it; views stay inside them.
fn inside(read: &StateDict, file: &[u8]) {
    let held: usize = read.storages.iter().map(|storage| storage.bytes.len()).sum();
    assert!(held <= file.len());
    for (_, view) in &read.tensors {
        let elements = read.storages[view.storage].elements() as i64;
        let steps = view.size.iter().zip(&view.stride);
        if !view.size.contains(&0) {
            let last: i64 = view.offset + steps.map(|(size, stride)| (size - 1) * stride).sum::<i64>();
            assert!(last < elements);
        }
    }
}

/// An archive of entries that are stored as they are.
fn archive(entries: &[(&str, &[u8])]) -> Vec<u8> {
    let (mut out, mut directory) = (Vec::new(), Vec::new());
    for (name, data) in entries {
        let offset = out.len() as u32;
        let mut numbers = crc32fast::hash(data).to_le_bytes().to_vec();
        numbers.extend((data.len() as u32).to_le_bytes());
        numbers.extend((data.len() as u32).to_le_bytes());
        numbers.extend((name.len() as u16).to_le_bytes());
        out.extend(b"PK\x03\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00");
        out.extend(&numbers);
        out.extend([0; 2]);
        out.extend(name.as_bytes());
        out.extend(*data);
        directory.extend(b"PK\x01\x02\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00");
        directory.extend(&numbers);
        directory.extend([0; 12]);
        directory.extend(offset.to_le_bytes());
        directory.extend(name.as_bytes());
    }
    let (offset, size) = (out.len() as u32, directory.len() as u32);
    out.extend(directory);
    out.extend(b"PK\x05\x06\x00\x00\x00\x00");
    for _ in 0..2 {
        out.extend((entries.len() as u16).to_le_bytes());
    }
    out.extend(size.to_le_bytes());
    out.extend(offset.to_le_bytes());
    out.extend([0; 2]);
    out
}

/// A safetensors file.
pub fn safetensors(bytes: &[u8]) -> bool {
    let Ok(header) = header::read(bytes, bytes.len() as u64) else {
        return false;
    };
    let end = header.tensors.last().map_or(0, |tensor| tensor.end);
    assert_eq!(header.data + end, bytes.len());
    true
}

/// An encoded image as a record has it, and as `infer` takes it. A decoder's memory is bounded by the largest side; to
/// keep each run short, images of more than a megapixel are left out here.
pub fn jpeg_record(bytes: &[u8]) -> bool {
    match decode::dimensions(bytes) {
        Ok((width, height)) if u64::from(width) * u64::from(height) <= 1 << 20 => {}
        _ => return false,
    }
    let mut pixels = [0; decode::PIXEL_BYTES];
    let mut read = |other_size| match decode::decode(bytes, other_size, &mut pixels) {
        Ok(()) => true,
        Err(what) => {
            assert!(!what.is_empty());
            false
        }
    };
    read(decode::OtherSize::Resize) && read(decode::OtherSize::Refuse)
}

/// A checkpoint's manifest.
pub fn manifest(bytes: &[u8]) -> bool {
    let Ok(manifest) = manifests::parse(Path::new("manifest.json"), bytes) else {
        return false;
    };
    assert!(manifests::validate(Path::new("manifest.json"), &manifest).is_ok());
    true
}
