//! `arcface-worker data`: what one subcommand writes the others read; damage is named and fails the command.

use std::{fs, path::Path};

use arcface_proto::{
    failure::{ExitCode, report},
    spec::{Augment, DataSpec},
};
use arcface_worker::{
    data::{self, DataError, Epochs, Loader, LoaderOptions, recordio::RecordFile},
    eval::VerificationSet,
    tools::data::{DataArgs, run},
};
use clap::Parser;

#[derive(clap::Parser)]
struct Cli {
    #[command(flatten)]
    args: DataArgs,
}

fn tool(arguments: &[&str]) -> Result<(), (String, ExitCode)> {
    let cli = Cli::try_parse_from(["data"].iter().chain(arguments)).unwrap();
    run(cli.args).map_err(|error| report(error.as_ref()))
}

fn synth(dir: &Path) {
    let out = dir.to_str().unwrap();
    tool(&[
        "synth",
        "--identities",
        "4",
        "--images-per-identity",
        "3",
        "--pairs",
        "10",
        "-o",
        out,
    ])
    .unwrap();
}

fn spec(rec: &Path, num_image: Option<u64>) -> DataSpec {
    DataSpec {
        rec: rec.to_str().unwrap().into(),
        num_image,
        num_workers: 1,
        augment: Augment::Flip,
    }
}

#[test]
fn drawn_identities_are_written_read_and_loaded() {
    let scratch = tempfile::tempdir().unwrap();
    let (a, b) = (scratch.path().join("a"), scratch.path().join("b"));
    synth(&a);
    synth(&b);
    for file in ["train.rec", "train.idx", "synth.bin"] {
        assert!(
            fs::read(a.join(file)).unwrap() == fs::read(b.join(file)).unwrap(),
            "{file} is drawn alike"
        );
    }
    assert_eq!(fs::read_dir(&a).unwrap().count(), 3, "no temporary file stays");
    tool(&["verify", a.to_str().unwrap()]).unwrap();
    tool(&["inspect", "--all", a.to_str().unwrap()]).unwrap();
    tool(&["inspect", "--output", "json", a.to_str().unwrap()]).unwrap();

    let set = VerificationSet::open(&a.join("synth.bin")).unwrap();
    assert_eq!(set.issame().iter().filter(|&&same| same).count(), 5);

    let dataset = data::open(&spec(&a, Some(12)), Some(4), 0, &[]).unwrap();
    assert_eq!((dataset.len(), dataset.num_classes()), (12, 4));
    let plan = Epochs::new(12, 4, 1).unwrap().plan(0, 1, 4, 0..3);
    let options = LoaderOptions {
        threads: 2,
        augment: Augment::Flip,
        seed: 1,
        prefetch: 2,
    };
    let mut labels: Vec<i64> = Loader::new(dataset, plan, options)
        .flat_map(|batch| Vec::<i64>::try_from(&batch.unwrap().labels).unwrap())
        .collect();
    labels.sort_unstable();
    assert_eq!(labels, [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]);
}

#[test]
fn numbers_that_disagree_are_refused_with_both() {
    let scratch = tempfile::tempdir().unwrap();
    synth(scratch.path());
    let open = |images, classes| match data::open(&spec(scratch.path(), images), classes, 0, &[]) {
        Ok(_) => panic!("not refused"),
        Err(error @ DataError::Mismatch { .. }) => error.to_string(),
        Err(error) => panic!("{error}"),
    };
    assert!(open(Some(13), None).starts_with("data.num_image: the job says 13, but "));
    assert!(open(Some(13), None).ends_with(" has 12"));
    assert!(open(None, Some(5)).starts_with("head.num_classes: the job says 5, but "));
    let outside = [scratch.path().join("elsewhere")];
    let refused = data::open(&spec(scratch.path(), None), None, 0, &outside);
    assert!(matches!(refused, Err(DataError::OutsideRoots { .. })));
}

#[test]
fn damage_is_listed_with_its_key() {
    let scratch = tempfile::tempdir().unwrap();
    synth(scratch.path());
    let rec = scratch.path().join("train.rec");
    let path = scratch.path().to_str().unwrap();
    let file = RecordFile::open(&rec, data::Access::Random).unwrap();
    let offset = file.index().offset(5).unwrap() as usize;
    drop(file);
    let mut bytes = fs::read(&rec).unwrap();
    // Of record 5: the beginning of the JPEG (after 8 bytes of framing and 24 of header).
    bytes[offset + 32..offset + 48].fill(0);
    // Of record 7: the label.
    let offset = RecordFile::open(&rec, data::Access::Random)
        .unwrap()
        .index()
        .offset(7)
        .unwrap() as usize;
    bytes[offset + 12..offset + 16].copy_from_slice(&9f32.to_le_bytes());
    fs::write(&rec, &bytes).unwrap();
    let (message, code) = tool(&["verify", path]).unwrap_err();
    assert_eq!(code, ExitCode::Failed);
    assert!(
        message.contains("2 of 12 images are damaged, 0 of 4 identities"),
        "{message}"
    );
    let set = data::open_path(scratch.path(), None).unwrap();
    for (index, expected) in [(4, "record 5 at offset"), (6, "record 7 at offset")] {
        let error = data::read_pixels(set.as_ref(), index, &mut [0; data::decode::PIXEL_BYTES]).unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
    }

    // An index that points past the end: one record is damaged, not the command.
    let idx = fs::read_to_string(scratch.path().join("train.idx")).unwrap();
    let lines: Vec<String> = idx
        .lines()
        .map(|line| {
            if line.starts_with("3\t") {
                "3\t99999996".into()
            } else {
                line.to_owned()
            }
        })
        .collect();
    fs::write(scratch.path().join("train.idx"), lines.join("\n")).unwrap();
    let (message, _) = tool(&["verify", path]).unwrap_err();
    assert!(message.contains("3 of 12 images are damaged"), "{message}");
    let Err(error) = data::open_path(scratch.path(), None) else {
        panic!("opened with a broken index");
    };
    assert!(
        error.to_string().contains("record 3 at offset 99999996"),
        "{error}"
    );
    let (_, code) = tool(&["inspect", "/nowhere"]).unwrap_err();
    assert_eq!(code, ExitCode::NotFound);
}

#[test]
fn shuffling_keeps_every_record() {
    let scratch = tempfile::tempdir().unwrap();
    let (from, to) = (scratch.path().join("from"), scratch.path().join("to"));
    synth(&from);
    tool(&["shuffle", from.to_str().unwrap(), "-o", to.to_str().unwrap()]).unwrap();
    let records = |dir: &Path| -> Vec<(u32, Vec<u8>)> {
        let set = data::open_path(dir, None).unwrap();
        (0..set.len())
            .map(|index| {
                let record = set.record(index).unwrap();
                let data::Image::Encoded(bytes, _) = record.image else {
                    panic!("records are encoded");
                };
                (record.label, bytes.into_owned())
            })
            .collect()
    };
    let (mut before, mut after) = (records(&from), records(&to));
    assert_ne!(before, after);
    before.sort();
    after.sort();
    assert_eq!(before, after);
    let (message, code) =
        tool(&["shuffle", from.to_str().unwrap(), "-o", from.to_str().unwrap()]).unwrap_err();
    assert_eq!(code, ExitCode::Usage, "{message}");
}

#[test]
fn folders_and_pairs_are_packed_or_refused() {
    let scratch = tempfile::tempdir().unwrap();
    let root = scratch.path();
    for (name, side) in [("b/1.png", 112), ("a/1.png", 112), ("a/2.png", 130)] {
        let path = root.join("faces").join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        image::RgbImage::from_pixel(side, side, image::Rgb([90, 120, side as u8]))
            .save(path)
            .unwrap();
    }
    let (faces, out) = (root.join("faces"), root.join("out"));
    let pack = ["pack", faces.to_str().unwrap(), "-o", out.to_str().unwrap()];
    let (message, _) = tool(&pack).unwrap_err();
    assert!(
        message.contains("a/2.png: the image is 130x130, not 112x112"),
        "{message}"
    );
    assert!(
        !out.join("train.rec").exists(),
        "nothing is left of a pack that failed"
    );
    tool(&[&pack[..], &["--resize"]].concat()).unwrap();
    tool(&["verify", out.to_str().unwrap()]).unwrap();
    let set = data::open_path(&out, None).unwrap();
    assert_eq!((set.len(), set.num_classes()), (3, 2));

    let pairs = root.join("faces/pairs.txt");
    fs::write(&pairs, "a/1.png\tb/1.png\t0\na/1.png\ta/2.png\t1\n").unwrap();
    let bin = root.join("mine.bin");
    let arguments = [
        "bin",
        "--pairs",
        pairs.to_str().unwrap(),
        "-o",
        bin.to_str().unwrap(),
    ];
    assert!(tool(&arguments).unwrap_err().0.contains("a/2.png"));
    tool(&[&arguments[..], &["--resize"]].concat()).unwrap();
    assert_eq!(VerificationSet::open(&bin).unwrap().issame(), [false, true]);
    fs::write(faces.join("label.txt"), "a/1.png\t0\nb/1.png\t2\n").unwrap();
    let (message, _) = tool(&pack).unwrap_err();
    assert!(
        message.contains("no image has label 1, but there are labels up to 2"),
        "{message}"
    );
}
