//! Golden data sets: RecordIO files written from the format's description, and real crops in a tar with a list.

mod golden;

use std::{fs, path::PathBuf, process::Command};

use arcface_worker::{
    data::{
        self, Access, Dataset, Image,
        decode::{PIXEL_BYTES, SIDE},
        read_pixels,
        record_set::RecordSet,
        recordio::RecordFile,
    },
    tools::data::{DataArgs, run},
};
use clap::Parser;
use serde_json::Value;

/// Folders `data/*` that hold a given file.
fn folders_with(name: &str) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(golden::root().join("data")) else {
        return Vec::new();
    };
    let mut found: Vec<PathBuf> = entries
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.join(name).is_file())
        .collect();
    found.sort();
    found
}

fn json(path: PathBuf) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

fn number(value: &Value) -> u64 {
    value
        .as_u64()
        .unwrap_or_else(|| panic!("{value} is no whole number"))
}

#[test]
fn records_equal_what_was_written() {
    let mut count = 0;
    for dir in folders_with("train.rec") {
        let expected = json(dir.join("expected.json"));
        let tensors = golden::read_safetensors(&dir.join("expected.safetensors"));
        let file = RecordFile::open(&dir.join("train.rec"), Access::Random).unwrap();
        file.check_offsets().unwrap();
        let records = expected["records"].as_array().unwrap();
        assert_eq!(file.index().len(), records.len());
        for record in records {
            let key = number(&record["key"]);
            let found = file.read(key).unwrap();
            assert_eq!(
                file.index().offset(key),
                record["offset"].as_u64(),
                "key {key}: offset"
            );
            let parts: Vec<(u64, u64)> = file
                .parts(key)
                .unwrap()
                .iter()
                .map(|part| (part.cflag.into(), part.length as u64))
                .collect();
            let expected_parts: Vec<(u64, u64)> = record["parts[cflag,len]"]
                .as_array()
                .unwrap()
                .iter()
                .map(|part| (number(&part[0]), number(&part[1])))
                .collect();
            assert_eq!(parts, expected_parts, "key {key}: parts");
            assert_eq!(u64::from(found.flag), number(&record["flag"]), "key {key}: flag");
            let labels: Vec<f64> = found.labels.iter().map(|label| f64::from(*label)).collect();
            let expected_labels: Vec<f64> = record["label"]
                .as_array()
                .unwrap()
                .iter()
                .map(|label| label.as_f64().unwrap())
                .collect();
            assert_eq!(labels, expected_labels, "key {key}: labels");
            assert_eq!(
                (found.id, found.id2),
                (number(&record["id"]), number(&record["id2"])),
                "key {key}: ids"
            );
            assert_eq!(
                file.payload(key).unwrap().len() as u64,
                number(&record["payload_len"]),
                "key {key}"
            );
            if let Some(jpeg) = tensors.get(&format!("jpeg.{key}")) {
                let jpeg: Vec<u8> = golden::values(&jpeg).into_iter().map(|byte| byte as u8).collect();
                assert!(found.body.as_ref() == jpeg, "key {key}: the JPEG's bytes differ");
            }
            count += 1;
        }
    }
    golden::report("data records", count);
}

#[test]
fn images_decode_to_the_expected_pixels() {
    let mut count = 0;
    for dir in folders_with("train.rec") {
        let expected = json(dir.join("expected.json"));
        let tensors = golden::read_safetensors(&dir.join("expected.safetensors"));
        let set = RecordSet::open(&dir.join("train.rec"), None).unwrap();
        assert_eq!(set.len(), number(&expected["num_images"]));
        assert_eq!(u64::from(set.num_classes()), number(&expected["num_ids"]));
        let labels = tensors.values("labels");
        let all = tensors.values("pixels_rgb");
        assert_eq!(all.len() as u64, set.len() * PIXEL_BYTES as u64);
        for (index, expected) in (0..set.len()).zip(all.chunks(PIXEL_BYTES)) {
            let mut pixels = [0; PIXEL_BYTES];
            let label = read_pixels(&set, index, &mut pixels).unwrap();
            assert_eq!(f64::from(label), labels[index as usize]);
            // Bit for bit: the decoder is the one that OpenCV and Pillow have.
            let apart = pixels.iter().zip(expected).filter(|(a, b)| f64::from(**a) != **b);
            assert_eq!(apart.count(), 0, "{}: values that differ", set.name(index));
            count += 1;
        }
    }
    golden::report("data pixels", count);
}

#[derive(clap::Parser)]
struct Cli {
    #[command(flatten)]
    args: DataArgs,
}

#[test]
fn real_crops_are_read_as_a_list_and_packed() {
    let mut count = 0;
    for tar in golden::golden_files("data", "", ".tar") {
        let expected = json(tar.with_extension("json"));
        let scratch = tempfile::tempdir().unwrap();
        let status = Command::new("tar")
            .arg("-xf")
            .arg(&tar)
            .arg("-C")
            .arg(scratch.path())
            .status()
            .unwrap();
        assert!(status.success());
        let root = scratch.path().join(tar.file_stem().unwrap());
        let packed = scratch.path().join("packed");
        let list = root.join("label.txt");
        let arguments = [
            "data",
            "pack",
            "--list",
            list.to_str().unwrap(),
            "-o",
            packed.to_str().unwrap(),
        ];
        run(Cli::parse_from(arguments).args).unwrap();

        let text = fs::read_to_string(&list).unwrap();
        let lines: Vec<(&str, u32)> = text
            .lines()
            .map(|line| line.split_once('\t').unwrap())
            .map(|(path, label)| (path, label.parse().unwrap()))
            .collect();
        let folder = data::open_path(&root, None).unwrap();
        let set = data::open_path(&packed, None).unwrap();
        assert_eq!(
            (folder.len(), set.len()),
            (lines.len() as u64, lines.len() as u64)
        );
        let mut in_order = lines.clone();
        in_order.sort_by_key(|(_, label)| *label);
        for (index, (path, label)) in (0..).zip(in_order) {
            let record = set.record(index).unwrap();
            assert_eq!(record.label, label);
            let Image::Encoded(bytes, _) = record.image else {
                panic!("a packed image is encoded");
            };
            assert!(
                bytes.as_ref() == fs::read(root.join(path)).unwrap(),
                "{path}: packing changed the bytes"
            );
        }
        for (index, (path, label)) in (0..).zip(&lines) {
            let mut pixels = [0; PIXEL_BYTES];
            assert_eq!(read_pixels(folder.as_ref(), index, &mut pixels).unwrap(), *label);
            let name = format!("{}/{path}", tar.file_stem().unwrap().display());
            let members = expected["members"].as_array().unwrap();
            let member = members
                .iter()
                .find(|member| member["name"] == name.as_str())
                .unwrap();
            assert_eq!(
                number(&member["size"]),
                fs::metadata(root.join(path)).unwrap().len()
            );
            assert_eq!(member["shape_hwc"], serde_json::json!([SIDE, SIDE, 3]));
            count += 1;
        }
    }
    golden::report("data real crops", count);
}
