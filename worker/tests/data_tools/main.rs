//! `arcface-worker data`: what one subcommand writes the others read; damage is named and fails the command.

mod refused;

use std::{fs, path::Path, process::Command};

use arcface_proto::{
    failure::{ExitCode, report},
    spec::{Augment, DataSpec},
};
use arcface_worker::{
    data::{self, DataError, Epochs, Form, Loader, LoaderOptions, recordio::RecordFile},
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
        cache: None,
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
        form: Form::Planes,
        cache: None,
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
    let (mut before, mut after) = (records(&from), records(&to));
    assert_ne!(before, after);
    before.sort();
    after.sort();
    assert_eq!(before, after);
    let (message, code) =
        tool(&["shuffle", from.to_str().unwrap(), "-o", from.to_str().unwrap()]).unwrap_err();
    assert_eq!(code, ExitCode::Usage, "{message}");
    let again = ["shuffle", from.to_str().unwrap(), "-o", to.to_str().unwrap()];
    let (message, code) = tool(&again).unwrap_err();
    assert!(message.contains("train.rec is there already") && message.contains("--force"));
    assert_eq!(code, ExitCode::Usage);
    tool(&[&again[..], &["--force"]].concat()).unwrap();
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

/// A picture of its own for each number, as a file of the path's kind.
fn picture(path: &Path, number: u32, side: u32) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    image::RgbImage::from_fn(side, side, |x, y| {
        image::Rgb([
            (x * (number + 1)) as u8,
            (y + 37 * number) as u8,
            (number * 11) as u8,
        ])
    })
    .save(path)
    .unwrap();
}

/// Labels and stored bytes of all images.
fn records(path: &Path) -> Vec<(u32, Vec<u8>)> {
    let set = data::open_path(path, None).unwrap();
    (0..set.len())
        .map(|index| {
            let record = set.record(index).unwrap();
            let data::Image::Encoded(bytes, _) = record.image else {
                panic!("records are encoded");
            };
            (record.label, bytes.into_owned())
        })
        .collect()
}

fn labels(path: &Path) -> Vec<u32> {
    records(path).iter().map(|(label, _)| *label).collect()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn names(set: &Path) -> Vec<String> {
    let list = fs::read_to_string(set.join("train.identities.tsv")).unwrap();
    list.lines()
        .map(|line| line.split_once('\t').unwrap().1.to_owned())
        .collect()
}

#[test]
fn files_are_packed_untouched_or_encoded_again_and_their_names_kept() {
    let scratch = tempfile::tempdir().unwrap();
    let at = |name: &str| scratch.path().join(name);
    let faces = at("faces");
    for (number, name) in (0u32..).zip(["b c/1.jpg", "b c/ü 2.png", "Ärzte/x.png", "a/1.jpg"]) {
        picture(&faces.join(name), number, 112);
    }
    let out = at("packed");
    tool(&["pack", text(&faces), "-o", text(&out), "--threads", "1"]).unwrap();
    assert_eq!(names(&out), ["a", "b c", "Ärzte"]);
    assert_eq!(fs::read_to_string(out.join("property")).unwrap(), "3,112,112\n");
    let packed = records(&out);
    assert_eq!(packed.len(), 4);
    for ((label, bytes), name) in packed
        .iter()
        .zip(["a/1.jpg", "b c/1.jpg", "b c/ü 2.png", "Ärzte/x.png"])
    {
        assert!(
            *bytes == fs::read(faces.join(name)).unwrap(),
            "{name} is untouched"
        );
        assert!(name.starts_with(&names(&out)[*label as usize]));
    }
    let (one, many) = (fs::read(out.join("train.rec")).unwrap(), at("many"));
    tool(&["pack", text(&faces), "-o", text(&many), "--threads", "4"]).unwrap();
    assert!(
        fs::read(many.join("train.rec")).unwrap() == one,
        "threads change nothing"
    );

    let is_jpeg = |(_, bytes): &(u32, Vec<u8>)| bytes.starts_with(&[0xff, 0xd8]);
    let jpeg = at("jpeg");
    tool(&["pack", text(&faces), "-o", text(&jpeg), "--png-to-jpeg"]).unwrap();
    assert!(records(&jpeg).iter().all(is_jpeg));
    assert_eq!(records(&jpeg)[0], packed[0]);
    tool(&[
        "pack",
        text(&faces),
        "-o",
        text(&jpeg),
        "--reencode",
        "40",
        "--force",
    ])
    .unwrap();
    assert!(records(&jpeg).iter().all(is_jpeg));
    assert_ne!(records(&jpeg)[0], packed[0]);
    let (message, code) = tool(&["pack", text(&faces), "-o", text(&jpeg)]).unwrap_err();
    assert!(
        message.contains("train.rec is there already") && code == ExitCode::Usage,
        "{message}"
    );
}

#[test]
fn lists_of_other_programs_are_packed_and_damaged_files_left_out_when_asked() {
    let scratch = tempfile::tempdir().unwrap();
    let at = |name: &str| scratch.path().join(name);
    for number in 0..4 {
        picture(&at(&format!("images/{number} a.jpg")), number, 112);
    }
    let list = at("train.lst");
    fs::write(
        &list,
        "9\t0.000000\t0 a.jpg\r\n3\t2.0\t2 a.jpg\r\n4\t2\t3 a.jpg\r\n",
    )
    .unwrap();
    let (images, out) = (at("images"), at("out"));
    let pack = [
        "pack",
        "--list",
        text(&list),
        "--root",
        text(&images),
        "-o",
        text(&out),
    ];
    let (message, _) = tool(&pack).unwrap_err();
    assert!(
        message.contains("no image has label 1") && message.contains("--renumber"),
        "{message}"
    );
    tool(&[&pack[..], &["--renumber"]].concat()).unwrap();
    assert_eq!(labels(&out), [0, 1, 1]);
    // One that is cut off, alone of its identity.
    let bytes = fs::read(at("images/0 a.jpg")).unwrap();
    fs::write(at("images/0 a.jpg"), &bytes[..bytes.len() / 2]).unwrap();
    let again = [&pack[..], &["--renumber", "--force"]].concat();
    let (message, code) = tool(&again).unwrap_err();
    assert!(
        message.contains("0 a.jpg: broken JPEG") && code == ExitCode::Failed,
        "{message}"
    );
    assert_eq!(labels(&out), [0, 1, 1], "the old set is as it was");
    tool(&[&again[..], &["--skip-damaged"]].concat()).unwrap();
    assert_eq!(labels(&out), [0, 0]);
    tool(&["verify", text(&out)]).unwrap();

    let empty = at("empty");
    fs::create_dir(&empty).unwrap();
    let (message, _) = tool(&["pack", text(&empty), "-o", text(&at("none"))]).unwrap_err();
    assert!(message.contains("nor a folder of images"), "{message}");
    fs::write(at("bad.jpg"), b"\xff\xd8no").unwrap();
    let only = at("only.lst");
    fs::write(&only, "bad.jpg\t0\n").unwrap();
    let none = at("none");
    let words = ["pack", "--list", text(&only), "--skip-damaged", "-o", text(&none)];
    let (message, _) = tool(&words).unwrap_err();
    assert!(message.contains("no image is left"), "{message}");
    assert!(!none.join("train.rec").exists());
}

#[test]
fn pairs_in_every_layout_become_a_set_that_python_reads() {
    let scratch = tempfile::tempdir().unwrap();
    let at = |name: &str| scratch.path().join(name);
    for (number, name) in (0u32..).zip([
        "Jo Ann/Jo Ann_0001.jpg",
        "Jo Ann/Jo Ann_0002.png",
        "B. J./B. J._0010.jpg",
    ]) {
        picture(&at(name), number, 112);
    }
    let (list, bin) = (at("pairs.txt"), at("mine.bin"));
    let make = ["bin", "--pairs", text(&list), "-o", text(&bin), "--force"];
    fs::write(&list, "1\t1\r\nJo Ann\t1\t2\r\nJo Ann\t2\tB. J.\t10\r\n").unwrap();
    tool(&make).unwrap();
    let lfw = fs::read(&bin).unwrap();
    let set = VerificationSet::open(&bin).unwrap();
    assert_eq!(set.issame(), [true, false]);
    assert_eq!(
        set.encoded(1).unwrap(),
        fs::read(at("Jo Ann/Jo Ann_0002.png")).unwrap()
    );
    assert_eq!(
        set.encoded(3).unwrap(),
        fs::read(at("B. J./B. J._0010.jpg")).unwrap()
    );
    let comma =
        "Jo Ann/Jo Ann_0001.jpg,Jo Ann/Jo Ann_0002.png,1\nJo Ann/Jo Ann_0002.png,B. J./B. J._0010.jpg,0\n";
    fs::write(&list, comma).unwrap();
    tool(&make).unwrap();
    assert!(fs::read(&bin).unwrap() == lfw, "the same pairs are the same file");

    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let output = Command::new(root.join("scripts/python.sh"))
        .arg(root.join("tests/python/read_bin.py"))
        .arg(&bin)
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    // EX_UNAVAILABLE: the packages are not there.
    if output.status.code() == Some(69) && std::env::var_os("CI").is_none() {
        eprintln!("SKIPPED: Python did not read the set: {}", stderr.trim());
    } else {
        assert!(output.status.success(), "{stderr}");
        let seen: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        let lengths: Vec<usize> = (0..4).map(|image| set.encoded(image).unwrap().len()).collect();
        assert_eq!(
            seen,
            serde_json::json!({"lengths": lengths, "issame": [true, false], "kind": "bytes"})
        );
    }

    fs::write(&list, "Jo Ann\t1\t2\nJo Ann\t1\tB. J.\t7\n").unwrap();
    let (message, code) = tool(&make).unwrap_err();
    assert!(
        message.contains("pairs.txt: line 2: ") && message.contains("B. J._0007.jpg: no such file"),
        "{message}"
    );
    assert_eq!(code, ExitCode::NotFound);
    fs::write(&list, "Jo Ann\t1\t2\nJo Ann\t1\tx\n").unwrap();
    assert!(
        tool(&make)
            .unwrap_err()
            .0
            .contains("line 2: \"x\" is no number of an image")
    );
    let (message, code) = tool(&make[..5]).unwrap_err();
    assert!(message.contains("line 2"), "{message}");
    assert_eq!(code, ExitCode::Failed);
    fs::write(&list, comma).unwrap();
    let (message, code) = tool(&make[..5]).unwrap_err();
    assert!(
        message.contains("mine.bin is there already") && code == ExitCode::Usage,
        "{message}"
    );
}

/// Two packed sets: `one` has identities a (3 images), b (1), c (2); `two` has a (2), of which the second is b's image.
fn two_sets(root: &Path) -> [std::path::PathBuf; 2] {
    for (name, number) in [
        ("one/a/1.png", 0),
        ("one/a/2.png", 1),
        ("one/a/3.png", 0),
        ("one/b/1.png", 3),
        ("one/c/1.png", 4),
        ("one/c/2.png", 5),
        ("two/a/1.png", 6),
        ("two/a/2.png", 3),
    ] {
        picture(&root.join(name), number, 112);
    }
    ["one", "two"].map(|name| {
        let out = root.join("packed").join(name);
        tool(&["pack", text(&root.join(name)), "-o", text(&out)]).unwrap();
        out
    })
}

#[test]
fn sets_are_joined_with_identities_of_their_own() {
    let scratch = tempfile::tempdir().unwrap();
    let [one, two] = two_sets(scratch.path());
    let out = scratch.path().join("both");
    let merge = ["merge", text(&one), text(&two), "-o", text(&out)];
    tool(&merge).unwrap();
    assert_eq!(labels(&out), [0, 0, 0, 1, 2, 2, 3, 3]);
    assert_eq!(names(&out), ["one/a", "one/b", "one/c", "two/a"]);
    let copied: Vec<Vec<u8>> = records(&out).into_iter().map(|record| record.1).collect();
    let before = [records(&one), records(&two)].concat();
    assert!(copied.iter().eq(before.iter().map(|record| &record.1)));
    tool(&["verify", text(&out)]).unwrap();
    tool(&["verify", "--output", "json", "--threads", "1", text(&out)]).unwrap();

    let (message, code) = tool(&merge).unwrap_err();
    assert!(message.contains("is there already") && code == ExitCode::Usage);
    tool(&[&merge[..], &["--force", "--dedup", "--report", "json"]].concat()).unwrap();
    assert_eq!(labels(&out), [0, 0, 1, 2, 2, 3]);
    let (message, code) = tool(&["merge", text(&one), text(&two), "--force", "-o", text(&two)]).unwrap_err();
    assert!(message.contains("would replace the input") && code == ExitCode::Usage);
    let (_, code) = tool(&["merge", text(&one), "/nowhere", "-o", text(&out), "--force"]).unwrap_err();
    assert_eq!(code, ExitCode::NotFound);

    // A shuffled set has no header, and labels in any order.
    let shuffled = scratch.path().join("shuffled");
    tool(&["shuffle", text(&one), "-o", text(&shuffled)]).unwrap();
    tool(&["merge", text(&shuffled), text(&two), "--force", "-o", text(&out)]).unwrap();
    assert_eq!(labels(&out), [0, 0, 0, 1, 2, 2, 3, 3]);
    assert_eq!(names(&out)[..2], ["shuffled/0", "shuffled/1"]);
}

#[test]
fn a_record_of_another_size_or_cut_off_is_named_and_nothing_written() {
    let scratch = tempfile::tempdir().unwrap();
    let [one, two] = two_sets(scratch.path());
    let large = scratch.path().join("large");
    fs::create_dir(&large).unwrap();
    let rec = large.join("train.rec");
    let mut writer = data::recordio_write::LayoutWriter::create(&rec, 1, 1).unwrap();
    let image = scratch.path().join("large.png");
    picture(&image, 1, 160);
    writer.write(0, &fs::read(&image).unwrap()).unwrap();
    writer.finish().unwrap();
    let out = scratch.path().join("out");
    let (message, _) = tool(&["merge", text(&one), text(&large), "-o", text(&out)]).unwrap_err();
    assert!(
        message.contains("large/train.rec: record 1 at offset") && message.contains("160x160"),
        "{message}"
    );
    assert!(!out.join("train.rec").exists() && !out.join("train.rec.partial").exists());

    // Cut in the middle of the second image of the last identity.
    let rec = two.join("train.rec");
    let bytes = fs::read(&rec).unwrap();
    fs::write(&rec, &bytes[..bytes.len() * 2 / 3]).unwrap();
    let (message, code) = tool(&["filter", text(&two), "-o", text(&out)]).unwrap_err();
    assert!(
        message.contains("record 2 at offset") && code == ExitCode::Failed,
        "{message}"
    );
    let (message, _) = tool(&["verify", text(&two)]).unwrap_err();
    assert!(message.contains("1 of 2 images are damaged"), "{message}");
    tool(&["filter", text(&two), "--drop-damaged", "-o", text(&out)]).unwrap();
    assert_eq!((labels(&out), names(&out)), (vec![0], vec!["a".to_owned()]));
}

#[test]
fn a_part_of_a_set_is_a_set_with_dense_labels() {
    let scratch = tempfile::tempdir().unwrap();
    let [one, _] = two_sets(scratch.path());
    let out = scratch.path().join("out");
    let filter = |more: &[&str]| {
        let words = ["filter", text(&one), "--force", "-o", text(&out)];
        tool(&[&words[..], more].concat())
    };
    filter(&["--min-images", "2", "--report", "json"]).unwrap();
    assert_eq!(
        (labels(&out), names(&out).concat()),
        (vec![0, 0, 0, 1, 1], "ac".into())
    );
    filter(&["--min-images", "2", "--max-images", "2"]).unwrap();
    assert_eq!((labels(&out), names(&out).concat()), (vec![0, 0], "c".into()));
    // Without the image that is there twice, a has two.
    filter(&["--dedup", "--max-images", "2"]).unwrap();
    assert_eq!(
        (labels(&out), names(&out).concat()),
        (vec![0, 0, 1, 2, 2], "abc".into())
    );
    filter(&["--cap", "1"]).unwrap();
    assert_eq!(labels(&out), [0, 1, 2]);
    filter(&["--identities", "2", "--seed", "7"]).unwrap();
    let drawn = (names(&out), fs::read(out.join("train.rec")).unwrap());
    assert_eq!(drawn.0.len(), 2);
    filter(&["--identities", "2", "--seed", "7"]).unwrap();
    assert!(drawn == (names(&out), fs::read(out.join("train.rec")).unwrap()));

    let list = scratch.path().join("list.txt");
    fs::write(&list, "c\r\nb\r\n").unwrap();
    filter(&["--keep", text(&list)]).unwrap();
    assert_eq!((labels(&out), names(&out).concat()), (vec![0, 1, 1], "bc".into()));
    filter(&["--drop", text(&list)]).unwrap();
    assert_eq!(names(&out), ["a"]);
    fs::write(&list, "c\nnobody\n").unwrap();
    let (message, code) = filter(&["--drop", text(&list)]).unwrap_err();
    assert!(
        message.contains("list.txt: line 2: the set has no identity \"nobody\"") && code == ExitCode::Failed,
        "{message}"
    );
    let (message, _) = filter(&["--min-images", "9"]).unwrap_err();
    assert!(message.contains("no image is left"), "{message}");
    assert_eq!(names(&out), ["a"], "the set before is as it was");
}

#[test]
fn faces_are_cut_out_into_a_folder_or_a_set() {
    let scratch = tempfile::tempdir().unwrap();
    let at = |name: &str| scratch.path().join(name);
    for (number, name) in (0u32..).zip(["photographs/ann/1.png", "photographs/bob lee/1.jpg"]) {
        picture(&at(name), number, 200);
    }
    let template = data::align::TEMPLATE
        .map(|[x, y]| format!("{},{}", x + 40.0, y + 30.0))
        .join(",");
    let list = at("photographs/faces.csv");
    fs::write(
        &list,
        format!("ann/1.png,{template}\nann/1.png,{template}\nbob lee/1.jpg,{template}\n"),
    )
    .unwrap();
    let (crops, rec) = (at("crops"), at("set/train.rec"));
    let align = ["align", "--landmarks", text(&list), "-o"];
    tool(&[&align[..], &[text(&crops)]].concat()).unwrap();
    for name in ["ann/1.jpg", "ann/1_2.jpg", "bob lee/1.jpg"] {
        let crop = image::open(crops.join(name)).unwrap();
        assert_eq!((crop.width(), crop.height()), (112, 112), "{name}");
    }
    let original = image::open(at("photographs/ann/1.png")).unwrap().into_rgb8();
    let crop = image::open(crops.join("ann/1.jpg")).unwrap().into_rgb8();
    for (channel, value) in crop.get_pixel(50, 60).0.iter().enumerate() {
        let expected = original.get_pixel(90, 90).0[channel];
        assert!(value.abs_diff(expected) < 12, "{value} {expected}");
    }
    let (message, code) = tool(&[&align[..], &[text(&crops)]].concat()).unwrap_err();
    assert!(
        message.contains("crops is there already") && code == ExitCode::Usage,
        "{message}"
    );

    tool(&[&align[..], &[text(&rec)]].concat()).unwrap();
    assert_eq!(labels(&rec), [0, 0, 1]);
    assert_eq!(names(&at("set")), ["ann", "bob lee"]);
    assert!(records(&rec)[0].1 == fs::read(crops.join("ann/1.jpg")).unwrap());
    let packed = at("packed");
    tool(&["pack", text(&crops), "-o", text(&packed)]).unwrap();
    assert!(fs::read(packed.join("train.rec")).unwrap() == fs::read(&rec).unwrap());

    fs::write(at("photographs/ann/1.png"), b"\x89PNG\r\n\x1a\nbroken").unwrap();
    let other = at("other");
    let words = [&align[..], &[text(&other)]].concat();
    let (message, _) = tool(&words).unwrap_err();
    assert!(message.contains("ann/1.png: broken PNG"), "{message}");
    assert!(!other.exists());
    tool(&[&words[..], &["--skip-damaged"]].concat()).unwrap();
    assert!(other.join("bob lee/1.jpg").is_file() && !other.join("ann").exists());
    let left: Vec<_> = fs::read_dir(scratch.path())
        .unwrap()
        .filter(|entry| {
            entry
                .as_ref()
                .unwrap()
                .file_name()
                .to_string_lossy()
                .starts_with(".align")
        })
        .collect();
    assert!(left.is_empty(), "no temporary folder stays");
}
