//! Whole checkpoints: written at one world size, read at another, damaged in every way, interrupted.

use super::*;
use crate::random::{Purpose, bits};
use arcface_proto::{
    types::ClassRange,
    v1::{CheckpointManifest, CheckpointPart, LossScaler},
};
use proptest::prelude::*;
use std::{fs, path::Path};
use tch::{Device, Kind, Tensor};

mod crashes;
mod stores;

const DIM: i64 = 3;

/// Rows of the given classes: the class and the column, in three kinds, and a value that all shards share.
fn head(classes: ClassRange) -> Vec<NamedTensor> {
    let class = Tensor::arange_start(
        i64::from(classes.lo),
        i64::from(classes.hi),
        (Kind::Float, Device::Cpu),
    );
    let columns = Tensor::arange(DIM, (Kind::Float, Device::Cpu)) / 8.0;
    let weight = class.unsqueeze(1) + columns;
    vec![
        ("head.touched".into(), class.to_kind(Kind::Int64)),
        ("head.weight".into(), weight.shallow_clone()),
        ("head.momentum".into(), (weight * 0.5).to_kind(Kind::BFloat16)),
        ("head.step".into(), Tensor::from(7i64)),
    ]
}

fn backbone() -> Vec<NamedTensor> {
    vec![
        (
            "conv.weight".into(),
            Tensor::arange(24, (Kind::Float, Device::Cpu)).view([2, 3, 4]),
        ),
        ("mask".into(), Tensor::from_slice(&[1u8, 0, 3])),
        ("bn.num_batches_tracked".into(), Tensor::from(41i64)),
        // Not contiguous.
        (
            "fc.weight".into(),
            Tensor::arange(6, (Kind::Double, Device::Cpu)).view([2, 3]).tr(),
        ),
    ]
}

/// Every second world trains in fp16.
fn scaler(world: u32) -> Option<LossScaler> {
    world.is_multiple_of(2).then_some(LossScaler {
        scale: 32768.0,
        good_updates: 7,
    })
}

fn write(dir: &Path, num_classes: u32, world: u32) -> CheckpointManifest {
    let mut parts = vec![write_part(dir, PartKind::Backbone, &backbone()).expect("written")];
    for rank in 0..world {
        let classes = ClassRange::of_rank(num_classes, rank, world);
        parts.push(write_part(dir, PartKind::Head(classes), &head(classes)).expect("written"));
    }
    let manifest = CheckpointManifest {
        format: manifest::FORMAT,
        job_id: "job-0123456789ab".into(),
        generation: 3,
        step: 1234,
        epoch: 2,
        epoch_samples: 4321,
        world_size: world,
        num_classes,
        directory: "checkpoints/step-1234".into(),
        parts,
        committed_at: None,
        scaler: scaler(world),
        damage: None,
        num_image: (world > 1).then_some(640),
    };
    write::write_manifest(dir, &manifest).expect("written");
    manifest
}

fn assert_same(ours: &[NamedTensor], expected: &[NamedTensor]) {
    assert_eq!(ours.len(), expected.len());
    for (name, tensor) in expected {
        let (_, found) = ours
            .iter()
            .find(|(n, _)| n == name)
            .unwrap_or_else(|| panic!("no {name}"));
        assert_eq!(
            (found.kind(), found.size()),
            (tensor.kind(), tensor.size()),
            "{name}"
        );
        assert!(found.equal(tensor), "{name}: {found} instead of {tensor}");
    }
}

fn read_all(dir: &Path, manifest: &CheckpointManifest) -> Result<(), CheckpointError> {
    let checkpoint = Checkpoint::open(dir, manifest.clone())?;
    checkpoint.backbone()?;
    checkpoint.head_rows(ClassRange {
        lo: 0,
        hi: manifest.num_classes,
    })?;
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn any_world_continues_any_other(classes in 1u32..60, old in 1u32..9, new in 1u32..9) {
        let dir = tempfile::tempdir().expect("scratch");
        write(dir.path(), classes, old);
        let checkpoint = Checkpoint::open_dir(dir.path()).expect("whole");
        assert_same(&checkpoint.backbone().expect("backbone"), &backbone());
        let state = TrainState { step: 1234, epoch: 2, epoch_samples: 4321, scaler: scaler(old), num_image: (old > 1).then_some(640) };
        prop_assert_eq!(checkpoint.train_state(), state);
        for rank in 0..new {
            let wanted = ClassRange::of_rank(classes, rank, new);
            assert_same(&checkpoint.head_rows(wanted).expect("rows"), &head(wanted));
        }
    }
}

/// What older versions committed has no fields for them, and a digest over what it has.
#[test]
fn a_manifest_without_loss_scale_or_images_does_not_mention_them() {
    let dir = tempfile::tempdir().expect("scratch");
    for (world, mentioned) in [(1, false), (2, true)] {
        write(dir.path(), 4, world);
        let text = fs::read_to_string(dir.path().join(manifest::FILE)).expect("written");
        for name in ["scaler", "num_image"] {
            assert_eq!(text.contains(name), mentioned, "{text}");
        }
    }
}

#[test]
fn chunks_are_put_together() {
    let dir = tempfile::tempdir().expect("scratch");
    let elements = (CHUNK / 4 * 2 + 5) as i64;
    let tensor = Tensor::arange(elements, (Kind::Int, Device::Cpu));
    let part = write_part(
        dir.path(),
        PartKind::Backbone,
        &[("long".into(), tensor.shallow_clone())],
    )
    .expect("written");
    let head = write_part(
        dir.path(),
        PartKind::Head(ClassRange { lo: 0, hi: 1 }),
        &head(ClassRange { lo: 0, hi: 1 }),
    );
    let manifest = CheckpointManifest {
        format: manifest::FORMAT,
        num_classes: 1,
        parts: vec![part, head.expect("written")],
        ..Default::default()
    };
    let checkpoint = Checkpoint::open(dir.path(), manifest).expect("whole");
    assert_same(&checkpoint.backbone().expect("read"), &[("long".into(), tensor)]);
}

#[test]
fn a_part_is_valid_safetensors() {
    let dir = tempfile::tempdir().expect("scratch");
    write_part(dir.path(), PartKind::Backbone, &backbone()).expect("written");
    let bytes = fs::read(dir.path().join("backbone.safetensors")).expect("read");
    let file = safetensors::SafeTensors::deserialize(&bytes).expect("valid safetensors");
    let fc = file.tensor("fc.weight").expect("there");
    assert_eq!((fc.dtype(), fc.shape()), (safetensors::Dtype::F64, &[3, 2][..]));
    let values: Vec<f64> = fc
        .data()
        .chunks_exact(8)
        .map(|b| f64::from_le_bytes(b.try_into().expect("8 bytes")))
        .collect();
    assert_eq!(values, [0.0, 3.0, 1.0, 4.0, 2.0, 5.0]);
}

/// What can happen to files at rest.
#[derive(Clone, Copy, Debug)]
enum Mutation {
    Flip,
    Cut,
    Grow,
    /// A write that the disk lost.
    ZeroTail,
    /// Another part has its name.
    Swap,
    /// The part of an older checkpoint has its place.
    Stale,
    Missing,
}

#[test]
fn every_mutation_of_a_part_is_noticed_before_use() {
    use Mutation::*;
    const ALL: [Mutation; 7] = [Flip, Cut, Grow, ZeroTail, Swap, Stale, Missing];
    let (dir, older) = (
        tempfile::tempdir().expect("scratch"),
        tempfile::tempdir().expect("scratch"),
    );
    // Heads of the same size, as most are.
    let manifest = write(dir.path(), 12, 3);
    for part in &manifest.parts {
        let mut stale = fs::read(dir.path().join(&part.file)).expect("read");
        *stale.last_mut().expect("not empty") ^= 1;
        fs::write(older.path().join(&part.file), stale).expect("write");
    }
    let mut noticed = 0;
    for round in 0..1400u64 {
        let draw = |what| bits(round, Purpose::Synthetic, what, 0);
        let mutation = ALL[round as usize % ALL.len()];
        let part = draw(0) as usize % manifest.parts.len();
        let other = &manifest.parts[(part + 1 + draw(3) as usize % 3) % manifest.parts.len()];
        let part = &manifest.parts[part];
        let path = dir.path().join(&part.file);
        let good = fs::read(&path).expect("read");
        let mut bad = good.clone();
        let at = draw(1) as usize % bad.len();
        match mutation {
            Flip => bad[at] ^= 1 << (draw(2) % 8),
            Cut => bad.truncate(at),
            Grow => bad.extend(vec![0; 1 + at % 9]),
            ZeroTail => bad[at..].fill(0),
            Swap => bad = fs::read(dir.path().join(&other.file)).expect("read"),
            Stale => bad = fs::read(older.path().join(&part.file)).expect("read"),
            Missing => {}
        }
        match mutation {
            Missing => fs::remove_file(&path).expect("remove"),
            _ => fs::write(&path, &bad).expect("write"),
        }
        if bad == good && !matches!(mutation, Missing) {
            read_all(dir.path(), &manifest).expect("the zeros were there before");
            continue;
        }
        let wanted = ClassRange { lo: 0, hi: 12 };
        let checkpoint = Checkpoint::open(dir.path(), manifest.clone());
        let error = checkpoint
            .and_then(|checkpoint| checkpoint.verify_for(wanted))
            .expect_err("damage went unnoticed");
        let named = error.path().is_some_and(|found| found == path);
        assert!(named && error.is_damage(), "{mutation:?}: {error}");
        let error = read_all(dir.path(), &manifest).expect_err("damaged bytes were used");
        let expected = match mutation {
            Cut | Grow => matches!(error, CheckpointError::Size { .. }),
            Flip | ZeroTail | Stale => matches!(error, CheckpointError::Digest { .. }),
            Swap => matches!(
                error,
                CheckpointError::Size { .. } | CheckpointError::Digest { .. }
            ),
            Missing => matches!(error, CheckpointError::Io { .. }),
        };
        assert!(expected, "{mutation:?}: {error}");
        noticed += 1;
        fs::write(&path, &good).expect("write");
    }
    assert!(noticed > 1200, "{noticed}");
    read_all(dir.path(), &manifest).expect("whole again");
}

/// What a rank will read is read when it is verified: once, and whatever becomes of the files.
#[test]
fn what_was_verified_needs_no_files_any_more() {
    let dir = tempfile::tempdir().expect("a directory");
    let classes = ClassRange { lo: 0, hi: 5 };
    let backbone = vec![("w".to_owned(), Tensor::from_slice(&[1f32, -2.5]))];
    let manifest = CheckpointManifest {
        format: manifest::FORMAT,
        num_classes: 5,
        parts: vec![
            write_part(dir.path(), PartKind::Backbone, &backbone).expect("written"),
            write_part(dir.path(), PartKind::Head(classes), &head(classes)).expect("written"),
        ],
        ..Default::default()
    };
    let checkpoint = Checkpoint::open(dir.path(), manifest).expect("opened");
    checkpoint.verify_for(classes).expect("whole");
    fs::remove_dir_all(dir.path()).expect("removed");
    for (read, written) in [
        (checkpoint.backbone().expect("read"), backbone),
        (checkpoint.head_rows(classes).expect("read"), head(classes)),
    ] {
        assert_eq!(read.len(), written.len());
        for (name, tensor) in written {
            let found = read.iter().find(|(found, _)| *found == name).expect("its name");
            assert_eq!(
                (found.1.kind(), found.1.size()),
                (tensor.kind(), tensor.size()),
                "{name}"
            );
            assert!(found.1.equal(&tensor), "{name}");
        }
    }
    assert!(checkpoint.head_rows(classes).is_err(), "it was given away");
}

/// What was fetched lies in a temporary file: one that fails later says nothing about the checkpoint.
#[test]
fn a_fetched_part_that_is_lost_again_is_no_damage() {
    let dir = tempfile::tempdir().expect("scratch");
    let manifest = write(dir.path(), 12, 2);
    let open = |part: &CheckpointPart| {
        fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open(dir.path().join(&part.file))
    };
    let wanted = ClassRange { lo: 3, hi: 9 };
    let checkpoint = Checkpoint::fetched(dir.path(), manifest.clone(), wanted, &mut |part| {
        Ok(open(part).expect("a part"))
    })
    .expect("whole");
    for part in &manifest.parts {
        open(part).and_then(|file| file.set_len(8)).expect("cut");
    }
    let error = checkpoint.head_rows(wanted).expect_err("it was cut");
    assert!(matches!(error, CheckpointError::Scratch { .. }), "{error}");
    assert!(!error.is_damage());
}

#[test]
fn a_tail_of_zeros_is_shown_and_a_folder_that_is_not_here_is_no_damage() {
    let dir = tempfile::tempdir().expect("scratch");
    let tensors = [(
        "w".to_owned(),
        Tensor::ones([1 << 20, 2], (Kind::Float, Device::Cpu)),
    )];
    let classes = ClassRange { lo: 0, hi: 1 };
    let place = dir.path().join("checkpoints/step-1");
    let manifest = CheckpointManifest {
        format: manifest::FORMAT,
        num_classes: 1,
        directory: "checkpoints/step-1".into(),
        parts: vec![
            write_part(&place, PartKind::Backbone, &tensors).expect("written"),
            write_part(&place, PartKind::Head(classes), &head(classes)).expect("written"),
        ],
        ..Default::default()
    };
    let verify = || Checkpoint::open(&place, manifest.clone())?.verify_for(classes);
    verify().expect("whole");
    let path = place.join("backbone.safetensors");
    let mut bytes = fs::read(&path).expect("read");
    let end = bytes.len();
    bytes[end - 5_000_000..].fill(0);
    fs::write(&path, &bytes).expect("write");
    let error = verify().expect_err("damaged");
    let words = format!(
        "contents changed, bytes {}..{end} are zero: BLAKE3",
        end - 5_000_000
    );
    assert!(error.is_damage() && error.to_string().contains(&words), "{error}");

    fs::remove_dir_all(&place).expect("remove");
    assert!(verify().expect_err("gone").is_damage(), "one checkpoint is gone");
    fs::remove_dir_all(dir.path().join("checkpoints")).expect("remove");
    assert!(
        !verify().expect_err("gone").is_damage(),
        "the output is not mounted here"
    );
}

#[test]
fn numbers_that_are_not_finite_are_not_written() {
    let dir = tempfile::tempdir().expect("scratch");
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let tensors = [
            ("fine".to_owned(), Tensor::from_slice(&[f32::MAX, -0.0, 1e-40])),
            ("w".to_owned(), Tensor::from_slice(&[0.0, bad])),
        ];
        let error = write_part(dir.path(), PartKind::Backbone, &tensors).expect_err("refused");
        assert_eq!(
            error.to_string(),
            "backbone.safetensors: tensor w: a number in it is not finite"
        );
        assert_eq!(fs::read_dir(dir.path()).expect("list").count(), 0);
    }
}

#[test]
fn a_changed_manifest_is_noticed_or_means_the_same() {
    let dir = tempfile::tempdir().expect("scratch");
    let manifest = write(dir.path(), 11, 3);
    let path = dir.path().join(manifest::FILE);
    let good = fs::read(&path).expect("read");
    let mut noticed = 0;
    for round in 0..600u64 {
        let mut bad = good.clone();
        let at = bits(round, Purpose::Synthetic, 0, 0) as usize % bad.len();
        bad[at] = bits(round, Purpose::Synthetic, 1, 0) as u8;
        fs::write(&path, &bad).expect("write");
        match manifest::read_manifest(dir.path()) {
            // White space, or the byte that was there.
            Ok(read) => assert_eq!(read, manifest),
            Err(_) => noticed += 1,
        }
    }
    assert!(noticed > 400, "{noticed}");
}

#[test]
fn missing_and_swapped_parts_are_named() {
    let dir = tempfile::tempdir().expect("scratch");
    // Two parts of the same size.
    let manifest = write(dir.path(), 8, 2);
    let (a, b) = (
        dir.path().join("head-0-4.safetensors"),
        dir.path().join("head-4-8.safetensors"),
    );
    let (good_a, good_b) = (fs::read(&a).expect("read"), fs::read(&b).expect("read"));
    assert_eq!(good_a.len(), good_b.len());
    fs::write(&a, &good_b).expect("write");
    fs::write(&b, &good_a).expect("write");
    let error = read_all(dir.path(), &manifest).expect_err("swapped").to_string();
    assert!(
        error.contains("head-0-4.safetensors: contents changed"),
        "{error}"
    );
    fs::remove_file(&b).expect("remove");
    let error = read_all(dir.path(), &manifest).expect_err("missing").to_string();
    assert!(
        error.contains("open") && error.contains("head-4-8.safetensors: No such file"),
        "{error}"
    );
}

#[test]
fn manifests_that_do_not_add_up_are_refused() {
    let dir = tempfile::tempdir().expect("scratch");
    let good = write(dir.path(), 8, 2);
    type Change = fn(&mut CheckpointManifest);
    let cases: [(Change, &str); 7] = [
        (|m| m.format = 2, "format 2, this program reads format 1"),
        (
            |m| m.parts[1].file = "../head-0-4.safetensors".into(),
            "is not known",
        ),
        (|m| m.parts[1].class_hi = 5, "is not known"),
        (|m| m.parts[0].blake3 = "ab".into(), "no BLAKE3 digest"),
        (|m| drop(m.parts.remove(0)), "0 backbone parts"),
        (|m| drop(m.parts.remove(2)), "no part holds class 4"),
        (
            |m| m.num_classes = 6,
            "a head part holds classes 4..8, but there are 6",
        ),
    ];
    for (change, expected) in cases {
        let mut manifest = good.clone();
        change(&mut manifest);
        let error = Checkpoint::open(dir.path(), manifest)
            .expect_err("refused")
            .to_string();
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn parts_that_disagree_are_refused() {
    let dir = tempfile::tempdir().expect("scratch");
    let mut manifest = write(dir.path(), 8, 2);
    let classes = ClassRange { lo: 4, hi: 8 };
    let wanted = ClassRange { lo: 2, hi: 6 };
    type Change = fn(&mut Vec<NamedTensor>);
    let cases: [(Change, &str); 3] = [
        (
            |t| t[3].1 = Tensor::from(8i64),
            "head.step: its value is not that of another part",
        ),
        (
            |t| t[1].1 = t[1].1.to_kind(Kind::Double),
            "another part has Float",
        ),
        (|t| drop(t.remove(0)), "head.touched: is missing"),
    ];
    for (change, expected) in cases {
        let mut tensors = head(classes);
        change(&mut tensors);
        manifest.parts[2] = write_part(dir.path(), PartKind::Head(classes), &tensors).expect("written");
        let checkpoint = Checkpoint::open(dir.path(), manifest.clone()).expect("whole");
        let error = checkpoint.head_rows(wanted).expect_err("refused").to_string();
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn what_cannot_be_stored_is_refused_before_anything_is_written() {
    let dir = tempfile::tempdir().expect("scratch");
    let classes = ClassRange { lo: 0, hi: 4 };
    let one = || Tensor::from_slice(&[1.0f32]);
    let twice = [("a".to_owned(), one()), ("a".to_owned(), one())];
    let error = write_part(dir.path(), PartKind::Backbone, &twice)
        .expect_err("twice")
        .to_string();
    assert_eq!(error, "backbone.safetensors: tensor a: the name is taken");
    let error = write_part(dir.path(), PartKind::Head(classes), &[("m".into(), one())])
        .expect_err("rows")
        .to_string();
    assert!(error.contains("1 rows for 4 classes"), "{error}");
    let complex = Tensor::zeros([2], (Kind::ComplexFloat, Device::Cpu));
    let error = write_part(dir.path(), PartKind::Backbone, &[("c".into(), complex)])
        .expect_err("kind")
        .to_string();
    assert!(error.contains("ComplexFloat is not stored"), "{error}");
    assert_eq!(fs::read_dir(dir.path()).expect("list").count(), 0);
}

#[test]
fn a_failed_write_leaves_nothing_behind() {
    let dir = tempfile::tempdir().expect("scratch");
    // The rename fails: a directory with something in it has the part's name.
    fs::create_dir_all(dir.path().join("backbone.safetensors/in the way")).expect("make");
    let error = write_part(dir.path(), PartKind::Backbone, &backbone())
        .expect_err("in the way")
        .to_string();
    assert!(
        error.starts_with("rename ") && error.contains("backbone.safetensors"),
        "{error}"
    );
    assert_eq!(fs::read_dir(dir.path()).expect("list").count(), 1);
    // Filling fails.
    let full = CheckpointError::io("write", Path::new("part"), 99);
    let result = write::replace(&disk::Real, &dir.path().join("part"), 99, |_| {
        Err(full(std::io::ErrorKind::StorageFull.into()))
    });
    let error = result.expect_err("full").to_string();
    assert_eq!(error, "write part: no space left for 99 bytes");
    assert_eq!(fs::read_dir(dir.path()).expect("list").count(), 1);
}

#[test]
fn writing_again_replaces_the_part() {
    let dir = tempfile::tempdir().expect("scratch");
    let nested = dir.path().join("a/b");
    let first = write_part(&nested, PartKind::Backbone, &backbone()).expect("written");
    let again = write_part(&nested, PartKind::Backbone, &backbone()).expect("written");
    assert_eq!(first, again);
    assert_eq!(fs::read_dir(&nested).expect("list").count(), 1);
}

#[test]
fn removal_stays_inside_the_output() {
    let dir = tempfile::tempdir().expect("scratch");
    let output = dir.path().join("output");
    write(&output.join("checkpoints/1"), 4, 1);
    for outside in ["", "..", "../output", "/etc", "checkpoints/../.."] {
        assert!(write::remove(&output, outside).is_err(), "{outside:?}");
    }
    write::remove(&output, "checkpoints/1").expect("removed");
    assert!(!output.join("checkpoints/1").exists() && output.join("checkpoints").exists());
    write::remove(&output, "checkpoints/1").expect("gone already");
}

#[test]
fn a_snapshot_uses_the_memory_of_an_older_one() {
    let values = |value: f64| Tensor::full([4], value, (Kind::Float, Device::Cpu));
    let first = write::snapshot(&[("a", &values(1.0)), ("b", &values(2.0))], Vec::new());
    let places: Vec<_> = first.iter().map(|(_, tensor)| tensor.data_ptr()).collect();
    let longer = Tensor::from_slice(&[5.0f32; 9]);
    let again = write::snapshot(&[("a", &values(3.0)), ("b", &longer)], first);
    assert_same(&again, &[("a".into(), values(3.0)), ("b".into(), longer)]);
    assert_eq!(again[0].1.data_ptr(), places[0]);
    assert_ne!(again[1].1.data_ptr(), places[1]);
}

#[test]
fn a_snapshot_does_not_follow_training() {
    let mut weight = Tensor::zeros([2], (Kind::Float, Device::Cpu)).set_requires_grad(true);
    let copies = write::snapshot(&[("w", &weight)], Vec::new());
    tch::no_grad(|| drop(weight.fill_(5.0)));
    assert_eq!(
        (copies[0].1.double_value(&[0]), copies[0].1.requires_grad()),
        (0.0, false)
    );
}
