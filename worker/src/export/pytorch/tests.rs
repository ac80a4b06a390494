//! Tests of the PyTorch reader and writer. `testdata/pytorch/write.py` made the checkpoint that is read here.

use std::fs::File;

use tch::{Device, Kind};
use zip::CompressionMethod;

use super::{state_dict::fits, *};

mod hostile;

fn sample() -> Vec<(&'static str, Tensor)> {
    let values = Tensor::arange(12, (Kind::Float, Device::Cpu)).view([3, 4]);
    vec![
        ("conv.weight", values.tr()),
        ("half", values.to_kind(Kind::Half)),
        ("bn.num_batches_tracked", Tensor::from(7i64)),
        ("empty", Tensor::zeros([0, 5], (Kind::Float, Device::Cpu))),
        ("brain", values.to_kind(Kind::BFloat16)),
    ]
}

#[test]
fn what_is_written_is_read_in_order() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.pth");
    let sample = sample();
    write(&path, sample.iter().map(|(n, t)| (*n, t))).unwrap();
    let read = read(&path).unwrap().tensors;
    assert_eq!(read.len(), sample.len());
    for ((name, tensor), (got_name, got)) in sample.iter().zip(&read) {
        assert_eq!(name, got_name);
        assert_eq!((got.size(), got.kind()), (tensor.size(), tensor.kind()), "{name}");
        assert_eq!(got, tensor, "{name}");
    }
}

#[test]
fn a_training_checkpoint_gives_its_network() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/pytorch/checkpoint.pth");
    let content = read(&path).unwrap();
    assert_eq!(content.beside, ["epoch", "global_step", "lr", "scaler"]);
    let read = content.tensors;
    let names: Vec<&str> = read.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(
        names,
        ["permuted", "tail", "count"],
        "without the wrapper's module."
    );
    let values = Tensor::arange(12, (Kind::Float, Device::Cpu));
    assert_eq!(read[0].1, values.view([4, 3]).tr());
    assert_eq!(read[1].1, values.narrow(0, 8, 4));
    assert_eq!((read[2].1.size(), read[2].1.int64_value(&[])), (vec![], 7));
}

#[test]
fn damaged_archives_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.pth");
    let sample = sample();
    write(&path, sample.iter().map(|(n, t)| (*n, t))).unwrap();
    let good = std::fs::read(&path).unwrap();
    for cut in [0, 10, good.len() / 2, good.len() - 1] {
        std::fs::write(&path, &good[..cut]).unwrap();
        assert!(read(&path).is_err(), "cut at {cut}");
    }
    // A flipped bit in the values is found by the archive's checksum.
    let at = good
        .windows(4)
        .position(|bytes| bytes == 11f32.to_le_bytes())
        .unwrap();
    let mut bad = good.clone();
    bad[at] ^= 1;
    std::fs::write(&path, &bad).unwrap();
    let error = read(&path).unwrap_err().to_string();
    assert!(
        error.contains("a.pth") && error.contains("archive/data/0"),
        "{error}"
    );
}

#[test]
fn a_view_must_stay_inside_its_storage() {
    assert!(fits(0, &[3, 4], &[4, 1], 12));
    assert!(fits(0, &[4, 3], &[1, 4], 12));
    assert!(fits(5, &[], &[], 6));
    assert!(fits(99, &[0, 3], &[3, 1], 0));
    assert!(!fits(1, &[3, 4], &[4, 1], 12));
    assert!(!fits(0, &[1 << 40], &[0], 12));
    assert!(!fits(0, &[i64::MAX, 2], &[1, 1], 12));
    assert!(!fits(i64::MAX, &[2], &[1], 12));
}

/// An archive with the given pickle and one storage of four floats.
fn with_pickle(pickle: &[u8]) -> (tempfile::TempDir, std::path::PathBuf) {
    use std::io::Write;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("evil.pt");
    let mut zip = zip::ZipWriter::new(File::create(&path).unwrap());
    let options = zip::write::SimpleFileOptions::default().compression_method(CompressionMethod::Stored);
    for (name, bytes) in [("x/data.pkl", pickle), ("x/data/0", &[0u8; 16])] {
        zip.start_file(name, options).unwrap();
        zip.write_all(bytes).unwrap();
    }
    zip.finish().unwrap();
    (folder, path)
}

#[test]
fn a_foreign_global_is_named_and_not_run() {
    let (_folder, path) = with_pickle(b"cposix\nsystem\n(X\x05\x00\x00\x00touchtR.");
    let error = read(&path).unwrap_err().to_string();
    assert!(error.contains("posix.system"), "{error}");
}

#[test]
fn things_that_are_no_state_dict_are_named() {
    let cases: [(&[u8], &str); 3] = [
        (b"I5\n.", "expected a state_dict"),
        (b"}X\x01\x00\x00\x00aI5\ns.", "key \"a\": expected a tensor, found an integer"),
        (
            // A view of eight elements over a storage of four.
            b"}X\x01\x00\x00\x00actorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\n\
              X\x01\x00\x00\x000X\x03\x00\x00\x00cpuI4\ntQI0\n(I8\nt(I1\nt\x89}tRs.",
            "exceed a storage of 4 elements",
        ),
    ];
    for (pickle, expected) in cases {
        let (_folder, path) = with_pickle(pickle);
        let error = read(&path).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}
