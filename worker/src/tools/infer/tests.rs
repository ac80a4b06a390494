//! `infer` as a user runs it: weights by the golden rule, a tensor or images in, embeddings out.

use arcface_proto::failure::report;
use image::{ImageBuffer, Rgb};
use tch::Device;

use super::*;
use crate::model::{Backbone, BackboneConfig, ForwardMode, fill};

fn args(folder: &Path) -> InferArgs {
    InferArgs {
        images: Vec::new(),
        network: "tiny".to_owned(),
        weights: folder.join("w.safetensors"),
        tensor: None,
        landmarks: None,
        flip: false,
        out: folder.join("out.safetensors"),
        batch: 2,
        precision: Precision::Fp32,
        place: PlaceArgs::default(),
    }
}

/// A folder with golden weights of `tiny`, and the network.
fn set_up() -> (tempfile::TempDir, Backbone) {
    let folder = tempfile::tempdir().unwrap();
    let mut backbone = Backbone::new(&BackboneConfig::new("tiny", 24)).unwrap();
    backbone.fill_golden();
    let tensors = backbone
        .state()
        .iter()
        .map(|entry| (entry.name.as_str(), &entry.tensor));
    safetensors::write(&folder.path().join("w.safetensors"), tensors).unwrap();
    (folder, backbone)
}

fn forward(backbone: &Backbone, images: &Tensor) -> Tensor {
    tch::no_grad(|| backbone.forward(images, &ForwardMode::evaluation(Precision::Fp32)))
}

fn distance(a: &Tensor, b: &Tensor) -> f64 {
    (a - b).norm().double_value(&[]) / b.norm().double_value(&[])
}

#[test]
fn a_tensor_gives_its_embeddings_in_any_batches() {
    let (folder, backbone) = set_up();
    let input = fill::symmetric("input", &[5, 3, 112, 112]);
    let tensor = folder.path().join("in.safetensors");
    safetensors::write(&tensor, [("input", &input)]).unwrap();
    run(InferArgs {
        tensor: Some(tensor.clone()),
        ..args(folder.path())
    })
    .unwrap();
    let out = safetensors::read(&folder.path().join("out.safetensors")).unwrap();
    let embedding = out.get("embedding").unwrap();
    assert_eq!((embedding.size(), embedding.kind()), (vec![5, 24], Kind::Float));
    assert!(distance(embedding, &forward(&backbone, &input)) < 1e-5);

    run(InferArgs {
        tensor: Some(tensor.clone()),
        flip: true,
        ..args(folder.path())
    })
    .unwrap();
    let out = safetensors::read(&folder.path().join("out.safetensors")).unwrap();
    let both = forward(&backbone, &input) + forward(&backbone, &input.flip([3]));
    assert!(distance(out.get("embedding").unwrap(), &both) < 1e-5);

    let bf16 = InferArgs {
        tensor: Some(tensor),
        precision: Precision::Bf16,
        ..args(folder.path())
    };
    run(bf16).unwrap();
    let out = safetensors::read(&folder.path().join("out.safetensors")).unwrap();
    let distance = distance(out.get("embedding").unwrap(), &forward(&backbone, &input));
    assert!((1e-5..5e-2).contains(&distance), "{distance}");
}

#[test]
fn images_of_any_size_in_folders_become_rows_in_order() {
    let (folder, backbone) = set_up();
    let faces = folder.path().join("faces");
    fs::create_dir_all(faces.join("b")).unwrap();
    let picture = |side: u32, blue: u8| {
        ImageBuffer::from_fn(side, side, |x, y| {
            Rgb([(x * 255 / side) as u8, (y * 255 / side) as u8, blue])
        })
    };
    picture(112, 10).save(faces.join("b").join("x.png")).unwrap();
    picture(112, 200).save(faces.join("a.png")).unwrap();
    picture(160, 90).save(faces.join("c.JPEG")).unwrap();
    fs::write(faces.join(".DS_Store"), b"junk").unwrap();
    fs::write(faces.join("label.txt"), b"a").unwrap();
    let out = folder.path().join("out.json");
    run(InferArgs {
        images: vec![faces.clone()],
        out: out.clone(),
        ..args(folder.path())
    })
    .unwrap();
    let report: serde_json::Value = serde_json::from_slice(&fs::read(out).unwrap()).unwrap();
    let names: Vec<PathBuf> = serde_json::from_value(report["images"].clone()).unwrap();
    assert_eq!(
        names,
        [faces.join("a.png"), faces.join("b/x.png"), faces.join("c.JPEG")]
    );
    let rows: Vec<Vec<f32>> = serde_json::from_value(report["embedding"].clone()).unwrap();

    // The second row, prepared by hand: (x / 255 - 0.5) / 0.5, planes R G B.
    let pixels = Tensor::from_slice(picture(112, 10).as_raw())
        .view([112, 112, 3])
        .to_kind(Kind::Float);
    let image = ((pixels / 255.0 - 0.5) / 0.5).permute([2, 0, 1]).unsqueeze(0);
    assert!(
        distance(
            &Tensor::from_slice(&rows[1]).unsqueeze(0),
            &forward(&backbone, &image)
        ) < 1e-5
    );

    run(InferArgs {
        images: vec![faces],
        out: folder.path().join("o.npy"),
        ..args(folder.path())
    })
    .unwrap();
    assert_eq!(
        fs::metadata(folder.path().join("o.npy")).unwrap().len(),
        128 + 3 * 24 * 4
    );
}

#[test]
fn faces_are_cut_out_by_their_landmarks() {
    let (folder, backbone) = set_up();
    let at = |name: &str| folder.path().join(name);
    let picture = ImageBuffer::from_fn(300, 200, |x, y| Rgb([x as u8, y as u8, (x * y) as u8]));
    picture.save(at("group.png")).unwrap();
    picture.save(at("other.png")).unwrap();
    // Two faces in one image: crops at (20, 30) and (150, 60), unturned and in their size.
    let row = |image: &str, left: f64, top: f64| {
        let points = align::TEMPLATE.map(|[x, y]| format!("{},{}", x + left, y + top));
        format!("{image},{}\n", points.join(","))
    };
    let rows = [
        row("group.png", 20.0, 30.0),
        row("other.png", 0.0, 0.0),
        row("group.png", 150.0, 60.0),
    ];
    fs::write(at("faces.csv"), rows.concat()).unwrap();
    let embed = |images: Vec<PathBuf>| {
        let out = at("out.json");
        run(InferArgs {
            images,
            landmarks: Some(at("faces.csv")),
            out: out.clone(),
            ..args(folder.path())
        })
        .unwrap();
        let report: serde_json::Value = serde_json::from_slice(&fs::read(out).unwrap()).unwrap();
        let names: Vec<PathBuf> = serde_json::from_value(report["images"].clone()).unwrap();
        let rows: Vec<Vec<f32>> = serde_json::from_value(report["embedding"].clone()).unwrap();
        (names, rows)
    };
    let (names, rows) = embed(vec![]);
    assert_eq!(names, [at("group.png"), at("other.png"), at("group.png")]);
    for (row, left, top) in [(0, 20, 30), (1, 0, 0), (2, 150, 60)] {
        let crop = image::imageops::crop_imm(&picture, left, top, 112, 112).to_image();
        let pixels = Tensor::from_slice(crop.as_raw()).view([112, 112, 3]);
        let pixels = pixels.to_kind(Kind::Float) / 255.0;
        let image = ((pixels - 0.5) / 0.5).permute([2, 0, 1]).unsqueeze(0);
        let ours = Tensor::from_slice(&rows[row]).unsqueeze(0);
        assert!(distance(&ours, &forward(&backbone, &image)) < 1e-4, "face {row}");
    }
    let (names, chosen) = embed(vec![at("group.png")]);
    assert_eq!(names, [at("group.png"), at("group.png")]);
    let [again, before] = [&chosen[1], &rows[2]].map(|row| Tensor::from_slice(row));
    assert!(distance(&again, &before) < 1e-5);
}

#[test]
fn bad_input_is_one_line_with_its_exit_code() {
    let (folder, _) = set_up();
    let at = |name: &str| folder.path().join(name);
    let said = |args: InferArgs| report(run(args).expect_err("must fail").as_ref());
    fs::write(at("broken.jpg"), b"\xff\xd8 no picture").unwrap();
    fs::create_dir(at("empty")).unwrap();
    let float = |shape: &[i64]| Tensor::zeros(shape, (Kind::Float, Device::Cpu));
    safetensors::write(&at("shape.safetensors"), [("input", &float(&[2, 3, 96, 96]))]).unwrap();
    safetensors::write(&at("name.safetensors"), [("images", &float(&[2, 3, 112, 112]))]).unwrap();
    fs::write(at("short.csv"), "a.jpg,1,2\n").unwrap();
    fs::write(at("gone.csv"), "gone.jpg,1,2,3,4,5,6,7,8,9,10\n").unwrap();
    fs::write(at("point.csv"), "broken.jpg,1,1,1,1,1,1,1,1,1,1\n").unwrap();
    fs::write(at("face.csv"), "broken.jpg,1,2,3,4,5,6,7,8,9,11\n").unwrap();
    fs::write(at("none.csv"), "\n").unwrap();
    let base = || args(folder.path());
    let landmarks = |name: &str| InferArgs {
        landmarks: Some(at(name)),
        ..base()
    };
    let images = |name: &str| InferArgs {
        images: vec![at(name)],
        ..base()
    };
    let tensor = |name: &str| InferArgs {
        tensor: Some(at(name)),
        ..base()
    };
    let cases = [
        (
            images("nowhere.jpg"),
            "nowhere.jpg does not exist",
            ExitCode::NotFound,
        ),
        (images("broken.jpg"), "broken.jpg: broken JPEG", ExitCode::Failed),
        (
            images("empty"),
            "no .jpg, .jpeg or .png file in it",
            ExitCode::NotFound,
        ),
        (
            tensor("nowhere.safetensors"),
            "does not exist",
            ExitCode::NotFound,
        ),
        (
            tensor("shape.safetensors"),
            "tensor input is Float [2, 3, 96, 96]",
            ExitCode::Failed,
        ),
        (tensor("name.safetensors"), "no tensor input", ExitCode::Failed),
        (
            landmarks("short.csv"),
            "short.csv: line 1: a.jpg: 2 numbers",
            ExitCode::Failed,
        ),
        (
            landmarks("gone.csv"),
            "gone.jpg does not exist",
            ExitCode::NotFound,
        ),
        (
            landmarks("point.csv"),
            "broken.jpg: its landmarks are all in one place",
            ExitCode::Failed,
        ),
        (landmarks("none.csv"), "it lists no face", ExitCode::Failed),
        (
            InferArgs {
                images: vec![at("shape.safetensors")],
                ..landmarks("face.csv")
            },
            "face.csv: no face of",
            ExitCode::Failed,
        ),
        (
            InferArgs {
                out: at("out.txt"),
                ..tensor("name.safetensors")
            },
            "unknown form of file",
            ExitCode::Usage,
        ),
        (
            InferArgs {
                weights: at("nowhere.pth"),
                ..images("broken.jpg")
            },
            "nowhere.pth does not exist",
            ExitCode::NotFound,
        ),
    ];
    for (args, expected, code) in cases {
        let (text, got) = said(args);
        assert!(text.contains(expected), "{text}");
        assert_eq!(got, code, "{text}");
        assert!(
            text.lines().filter(|line| !line.starts_with("hint: ")).count() == 1,
            "{text}"
        );
    }
    assert!(!at("out.safetensors").exists());
}

#[test]
fn embeddings_that_are_no_numbers_are_not_written() {
    let (folder, _) = set_up();
    let input = fill::symmetric("input", &[4, 3, 112, 112]);
    let _ = input.get(2).fill_(f64::NAN);
    let tensor = folder.path().join("in.safetensors");
    safetensors::write(&tensor, [("input", &input)]).unwrap();
    let given = InferArgs {
        tensor: Some(tensor),
        ..args(folder.path())
    };
    let out = given.out.clone();
    let error = run(given).expect_err("refused");
    let failure = error.downcast_ref::<Failure>().expect("a failure");
    assert_eq!(
        failure.message,
        "input[2]: its embedding is not finite (1 in all)"
    );
    assert_eq!(failure.code, ExitCode::Failed);
    assert!(!out.exists());
    let over_the_weights = InferArgs {
        tensor: Some(folder.path().join("in.safetensors")),
        out: folder.path().join("w.safetensors"),
        ..args(folder.path())
    };
    let error = run(over_the_weights).expect_err("refused").to_string();
    assert!(error.contains("would replace the input"), "{error}");
}
