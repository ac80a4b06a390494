//! The tool on a drawn set with planted wrong labels and centres that fit the right ones.

use super::*;
use crate::{
    checkpoint::{PartKind, manifest, write, write_part},
    data::recordio_write::LayoutWriter,
    export::safetensors,
    model::{BackboneConfig, ForwardMode},
};
use arcface_proto::v1::CheckpointManifest;
use image::RgbImage;

const IDENTITIES: u32 = 3;
const IMAGES: u32 = 5;

/// Drawn faces; the last image of each identity but the last shows stripes: a label that is wrong even to the eye of
/// an untrained network.
fn noisy_set(folder: &Path) -> RecordSet {
    let rec = folder.join("train.rec");
    let total = u64::from(IDENTITIES * IMAGES);
    let mut writer = LayoutWriter::create(&rec, total, IDENTITIES).unwrap();
    for label in 0..IDENTITIES {
        for image in 0..IMAGES {
            let wrong = image == IMAGES - 1 && label + 1 < IDENTITIES;
            let mut pixels = [0; PIXEL_BYTES];
            if wrong {
                let stripes = |at: usize| if at / 3 % 8 < 4 { 255 } else { 0 };
                pixels = std::array::from_fn(stripes);
            } else {
                data::synthetic::draw(7, label.into(), image.into(), &mut pixels);
            }
            let drawn = RgbImage::from_raw(112, 112, pixels.to_vec()).unwrap();
            writer
                .write(label, &data::recode::encode(&drawn, 95).unwrap())
                .unwrap();
        }
    }
    writer.finish().unwrap();
    RecordSet::open(&rec, None).unwrap()
}

fn embed(set: &RecordSet, backbone: &Backbone) -> Tensor {
    let (images, _) = load(set, 0, set.len()).unwrap();
    tch::no_grad(|| unit(&backbone.forward(&images, &ForwardMode::evaluation(Precision::Fp32))))
}

fn write_checkpoint(dir: &Path, weight: &Tensor, num_classes: u32) {
    let classes = ClassRange {
        lo: 0,
        hi: num_classes,
    };
    let parts = vec![
        write_part(dir, PartKind::Backbone, &[("unused".into(), Tensor::from(1i64))]).unwrap(),
        write_part(
            dir,
            PartKind::Head(classes),
            &[("weight".into(), weight.shallow_clone())],
        )
        .unwrap(),
    ];
    let manifest = CheckpointManifest {
        format: manifest::FORMAT,
        job_id: "job-0123456789ab".into(),
        generation: 1,
        step: 1,
        world_size: 1,
        num_classes,
        directory: "checkpoints/c".into(),
        parts,
        ..Default::default()
    };
    write::write_manifest(dir, &manifest).unwrap();
}

/// A data set, an untrained network, and a checkpoint whose classes have one centre amid the right images and one at
/// the wrong one.
struct Scene {
    scratch: tempfile::TempDir,
    set: RecordSet,
    centers: Tensor,
    backbone: Backbone,
}

impl Scene {
    fn new() -> Self {
        let scratch = tempfile::tempdir().unwrap();
        let folder = scratch.path().join("noisy");
        std::fs::create_dir(&folder).unwrap();
        let set = noisy_set(&folder);
        let mut backbone = Backbone::new(&BackboneConfig::new("tiny", 16)).unwrap();
        backbone.init_random(5);
        let state = backbone.state();
        let named = state.iter().map(|entry| (entry.name.as_str(), &entry.tensor));
        safetensors::write(&scratch.path().join("w.safetensors"), named).unwrap();
        let by_image = embed(&set, &backbone).view([IDENTITIES.into(), IMAGES.into(), 16]);
        let right =
            by_image
                .narrow(1, 0, i64::from(IMAGES) - 1)
                .mean_dim([1i64].as_slice(), false, None::<Kind>);
        let wrong = by_image.select(1, i64::from(IMAGES) - 1);
        let centers = Tensor::stack(&[wrong, right], 1);
        write_checkpoint(&scratch.path().join("c"), &centers, IDENTITIES);
        Self {
            scratch,
            set,
            centers: unit(&centers),
            backbone,
        }
    }

    fn args(&self, angle: f64) -> CleanArgs {
        let at = |name: &str| self.scratch.path().join(name);
        CleanArgs {
            path: at("noisy"),
            network: "tiny".into(),
            weights: at("w.safetensors"),
            checkpoint: at("c"),
            output: at("clean"),
            angle,
            dropped: Some(at("dropped.tsv")),
            batch: 4,
            force: false,
            report: Output::Json,
        }
    }
}

#[test]
fn images_far_from_the_main_centre_are_dropped_and_the_rest_copied() {
    let scene = Scene::new();
    let network = scene.backbone.for_inference(Precision::Fp32);
    let angles = measure(&scene.set, &network, &scene.centers, 4).unwrap();
    // Between the farthest image that stays and the nearest that goes, which is a planted one in class 0 or 1.
    let mut sorted = angles.clone();
    sorted.sort_by(f64::total_cmp);
    let limit = (sorted[12] + sorted[13]) / 2.0;
    let args = scene.args(limit);
    run(&args).unwrap();
    let cleaned = RecordSet::open(&args.output.join("train.rec"), None).unwrap();
    assert_eq!(cleaned.len(), 13);
    let labels: Vec<u32> = (0..13)
        .map(|index| cleaned.record(index).unwrap().label)
        .collect();
    assert_eq!(
        labels,
        [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 2],
        "the planted images are gone: {angles:?}"
    );
    let Image::Encoded(copied, _) = cleaned.record(4).unwrap().image else {
        panic!("a record is encoded");
    };
    let Image::Encoded(original, _) = scene.set.record(5).unwrap().image else {
        panic!("a record is encoded");
    };
    assert_eq!(copied, original);
    let listed = std::fs::read_to_string(args.dropped.unwrap()).unwrap();
    assert_eq!(listed.lines().count(), 2, "{listed}");
    assert!(listed.lines().next().unwrap().contains("\t0\t"), "{listed}");
}

#[test]
fn what_does_not_fit_together_is_refused() {
    let scene = Scene::new();
    let message = |args: &CleanArgs| run(args).expect_err("refused").to_string();
    let mut args = scene.args(75.0);
    args.output = args.path.clone();
    assert!(message(&args).contains("would replace the input"));

    // Neither the set nor the weights become a list.
    for input in [scene.args(75.0).path.join("train.idx"), scene.args(75.0).weights] {
        let mut args = scene.args(75.0);
        args.dropped = Some(input.clone());
        let before = std::fs::read(&input).unwrap();
        assert!(message(&args).contains("would replace the input"));
        assert_eq!(std::fs::read(&input).unwrap(), before);
    }
    assert!(message(&scene.args(0.0)).contains("no image is within 0 degrees"));

    let args = scene.args(75.0);
    write_checkpoint(
        &args.checkpoint,
        &Tensor::zeros([4, 16], (Kind::Float, tch::Device::Cpu)),
        4,
    );
    assert!(message(&args).contains("4 classes, the data set has 3"));

    let args = scene.args(75.0);
    let flat = Tensor::zeros([3, 8], (Kind::Float, tch::Device::Cpu));
    let _ = std::fs::remove_dir_all(&args.checkpoint);
    write_checkpoint(&args.checkpoint, &flat, 3);
    assert!(message(&args).contains("weight has the form [3, 8]"));
    assert!(degrees("75").is_ok() && degrees("-1").is_err() && degrees("NaN").is_err());
}
