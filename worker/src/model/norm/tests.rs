//! The function on the CPU, with its own arithmetic and with the kernels' twins, against libtorch's operations in double precision.

use std::sync::Arc;

use arcface_proto::spec::Precision;
use proptest::prelude::*;
use tch::{Device, Kind, Tensor};

use super::*;
use crate::{
    kernels::twin::launcher::TwinLauncher,
    model::{Backbone, BackboneConfig, DropoutDraw, ForwardMode},
    random::{Purpose, Stream},
};

const MOMENTUM: f64 = 0.1;
const EPS: f64 = 1e-5;

fn twins(block: u32) -> Kernels {
    Kernels::new(Arc::new(TwinLauncher::new(block)), Device::Cpu)
}

fn norm<'a>(weight: &'a Tensor, bias: &'a Tensor, running: Option<(&'a Tensor, &'a Tensor)>) -> Norm<'a> {
    Norm {
        weight,
        bias,
        running,
        momentum: MOMENTUM,
        eps: EPS,
    }
}

/// What goes in, in f32; activations as `kind` has them.
struct Case {
    x: Tensor,
    grad: Tensor,
    weight: Tensor,
    bias: Tensor,
    slope: Tensor,
    shortcut: Tensor,
}

#[derive(Clone, Copy, Debug)]
enum Behind {
    Nothing,
    PRelu,
    Add,
}

impl Case {
    fn new(size: [i64; 4], kind: Kind, seed: u64) -> Self {
        let mut stream = Stream::new(seed, Purpose::Synthetic, 0, 0);
        let mut normals = |size: &[i64]| {
            let count = size.iter().product::<i64>() as usize;
            let drawn: Vec<f32> = (0..count).map(|_| stream.next_normal() as f32).collect();
            Tensor::from_slice(&drawn).view(size)
        };
        let [n, c, h, w] = size;
        let mut image = |scale: f64, middle: f64| {
            let drawn = normals(&[n, h, w, c]) * scale + middle;
            drawn.to_kind(kind).permute([0, 3, 1, 2])
        };
        let [x, grad, shortcut] =
            [(2.0, 3.0), (1.0, 0.1), (1.0, 0.0)].map(|(scale, middle)| image(scale, middle));
        let [weight, bias, slope] = [(); 3].map(|()| normals(&[c]));
        Self {
            x,
            grad,
            weight,
            bias,
            slope,
            shortcut,
        }
    }

    /// y, the gradients of all inputs that there are, and the running statistics.
    fn ours(&self, kernels: Option<&Kernels>, behind: Behind) -> Vec<Tensor> {
        self.run(self.x.kind(), Kind::Float, behind, |leaves, mean, var| {
            let [x, weight, bias, last] = leaves;
            let then = match behind {
                Behind::Nothing => Then::Nothing,
                Behind::PRelu => Then::PRelu(last),
                Behind::Add => Then::Add(last),
            };
            let norm = norm(weight, bias, Some((mean, var)));
            let place = kernels.map_or(Place::Cpu, |_| Place::Gpu);
            assert!(takes_form(place, &x.size(), x.kind()) && is_laid_out(x));
            batch_norm(kernels, x, &norm, then)
        })
    }

    fn expected(&self, behind: Behind) -> Vec<Tensor> {
        self.run(Kind::Double, Kind::Double, behind, |leaves, mean, var| {
            let [x, weight, bias, last] = leaves;
            let z = x.batch_norm(
                Some(weight),
                Some(bias),
                Some(mean),
                Some(var),
                true,
                MOMENTUM,
                EPS,
                false,
            );
            match behind {
                Behind::Nothing => z,
                Behind::PRelu => z.prelu(last),
                Behind::Add => z + last,
            }
        })
    }

    fn run(
        &self,
        images: Kind,
        numbers: Kind,
        behind: Behind,
        forward: impl Fn([&Tensor; 4], &Tensor, &Tensor) -> Tensor,
    ) -> Vec<Tensor> {
        let leaf = |tensor: &Tensor, kind| tensor.to_kind(kind).detach().set_requires_grad(true);
        let x = leaf(&self.x, images);
        let (weight, bias) = (leaf(&self.weight, numbers), leaf(&self.bias, numbers));
        let last = match behind {
            Behind::Add => leaf(&self.shortcut, images),
            _ => leaf(&self.slope, numbers),
        };
        let channels = [self.weight.size()[0]];
        let mean = Tensor::full(channels, 0.5, (numbers, Device::Cpu));
        let var = Tensor::full(channels, 2.0, (numbers, Device::Cpu));
        let y = forward([&x, &weight, &bias, &last], &mean, &var);
        let loss = (&y * self.grad.to_kind(images)).sum(numbers);
        let mut leaves = vec![&x, &weight, &bias];
        if !matches!(behind, Behind::Nothing) {
            leaves.push(&last);
        }
        let grads = Tensor::run_backward(&[loss], &leaves, false, false);
        let mut all = vec![y.detach()];
        all.extend(grads);
        all.extend([mean, var]);
        all
    }
}

/// On the CPU without a block of threads.
fn compare(case: &Case, block: Option<u32>, behind: Behind, tolerance: f64) {
    let kernels = block.map(twins);
    let (ours, expected) = (case.ours(kernels.as_ref(), behind), case.expected(behind));
    assert_eq!(ours.len(), expected.len());
    assert_eq!(ours[0].kind(), case.x.kind());
    for (number, (ours, expected)) in ours.iter().zip(&expected).enumerate() {
        assert_eq!(ours.size(), expected.size());
        let norm = expected.norm().double_value(&[]).max(1e-2);
        let difference = (ours.to_kind(Kind::Double) - expected).norm().double_value(&[]) / norm;
        assert!(
            difference <= tolerance,
            "result {number} of {behind:?} in blocks of {block:?}: {difference:e}, {:?}",
            case.x.size()
        );
    }
}

const ALL: [Behind; 3] = [Behind::Nothing, Behind::PRelu, Behind::Add];

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn values_gradients_and_statistics_are_libtorchs(
        n in 1i64..5, groups in 0u32..5, h in 3i64..7, w in 2i64..7,
        block in prop::sample::select(vec![4u32, 16, 64]),
        which in 0usize..3, bf16 in any::<bool>(), seed in 0u64..1000,
    ) {
        let (kind, tolerance) = if bf16 { (Kind::BFloat16, 6e-3) } else { (Kind::Float, 1e-4) };
        let case = Case::new([n, 8 << groups, h, w], kind, seed);
        compare(&case, Some(block), ALL[which], tolerance);
    }

    #[test]
    fn on_the_cpu_too_with_any_number_of_channels(
        n in 1i64..5, channels in 1i64..70, h in 3i64..7, w in 2i64..7,
        which in 0usize..3, bf16 in any::<bool>(), seed in 0u64..1000,
    ) {
        let (kind, tolerance) = if bf16 { (Kind::BFloat16, 6e-3) } else { (Kind::Float, 1e-4) };
        compare(&Case::new([n, channels, h, w], kind, seed), None, ALL[which], tolerance);
    }
}

/// Enough rows for many chunks, and more channels than a block has threads for.
#[test]
fn large_ones() {
    for (size, block) in [
        ([2, 16, 50, 40], Some(32)),
        ([1, 512, 6, 5], Some(32)),
        ([4, 16, 90, 80], None),
        ([1, 512, 6, 5], None),
    ] {
        for behind in ALL {
            compare(&Case::new(size, Kind::Float, 5), block, behind, 1e-5);
            compare(&Case::new(size, Kind::BFloat16, 5), block, behind, 6e-3);
        }
    }
}

/// Squares of large numbers would lose what they differ by.
#[test]
fn what_lies_far_from_zero_keeps_its_variance() {
    let mut case = Case::new([4, 8, 9, 9], Kind::Float, 5);
    case.x = &case.x + 3000.0;
    for block in [Some(16), None] {
        compare(&case, block, Behind::PRelu, 1e-3);
    }
}

#[test]
fn statistics_stay_where_they_are_wanted_to_and_nothing_is_kept_without_autograd() {
    let case = Case::new([2, 8, 3, 3], Kind::Float, 5);
    let norm = norm(&case.weight, &case.bias, None);
    let nobody = None::<&Tensor>;
    let weight = Some(&case.weight);
    let expected = case.x.batch_norm(
        weight,
        Some(&case.bias),
        nobody,
        nobody,
        true,
        MOMENTUM,
        EPS,
        false,
    );
    for kernels in [Some(twins(8)), None] {
        let y = batch_norm(kernels.as_ref(), &case.x, &norm, Then::Nothing);
        assert!((&y - &expected).abs().max().double_value(&[]) < 1e-5);
        assert!(!y.requires_grad());
    }
}

#[test]
fn the_number_of_threads_changes_no_bit() {
    let case = Case::new([4, 32, 40, 40], Kind::BFloat16, 5);
    let threads = tch::get_num_threads();
    let with = |threads| {
        tch::set_num_threads(threads);
        case.ours(None, Behind::PRelu)
    };
    let (one, two) = (with(1), with(2));
    tch::set_num_threads(threads);
    assert_eq!(one, two);
}

/// Every norm of an IResNet and of a MobileFaceNet that is followed by something.
#[test]
fn a_network_trains_alike_with_and_without() {
    let mut stream = Stream::new(8, Purpose::Synthetic, 0, 0);
    let pixels: Vec<f32> = (0..6 * 3 * 112 * 112)
        .map(|_| stream.next_normal() as f32)
        .collect();
    let images = Tensor::from_slice(&pixels).view([6, 3, 112, 112]);
    for network in ["tiny", "mbf"] {
        let train = |change: &dyn Fn(&mut Backbone)| {
            let mut backbone = Backbone::new(&BackboneConfig::new(network, 32)).expect("a network");
            backbone.init_random(3);
            change(&mut backbone);
            let mode = ForwardMode::training(Precision::Fp32, DropoutDraw::default());
            let pass = backbone.forward_to_train(&images, &mode);
            let embedding = pass.embedding();
            pass.backward(&embedding.sin());
            let state = backbone.state().iter();
            let state: Vec<(String, Tensor)> = state
                .map(|entry| (entry.name.clone(), entry.tensor.detach().copy()))
                .collect();
            let gradients = backbone
                .trainable()
                .into_iter()
                .map(|(_, parameter)| parameter.grad());
            (embedding, state, gradients.collect::<Vec<Tensor>>())
        };
        let (embedding, state, gradients) = train(&|backbone| backbone.compute_plainly());
        for (place, ours) in [
            ("CPU", train(&|_| {})),
            ("GPU", train(&|backbone| backbone.compute_with(Some(twins(4))))),
        ] {
            let near = |what: &str, ours: &Tensor, expected: &Tensor, tolerance: f64| {
                // The mean of what was just normalised is 0 but for rounding errors.
                let norm = expected.to_kind(Kind::Double).norm().double_value(&[]).max(1e-3);
                let difference = (ours - expected).to_kind(Kind::Double).norm().double_value(&[]) / norm;
                assert!(
                    difference < tolerance,
                    "{network} on a {place}, {what}: {difference:e}"
                );
            };
            near("embedding", &ours.0, &embedding, 1e-3);
            assert_eq!((ours.1.len(), ours.2.len()), (state.len(), gradients.len()));
            for ((name, ours), (_, expected)) in ours.1.iter().zip(&state) {
                near(name, ours, expected, 1e-3);
            }
            // In one row: what a batch norm follows has a gradient of rounding errors alone.
            let row = |tensors: &[Tensor]| {
                let rows: Vec<Tensor> = tensors.iter().map(|tensor| tensor.view([-1])).collect();
                Tensor::cat(&rows, 0)
            };
            near("gradients", &row(&ours.2), &row(&gradients), 1e-2);
        }
    }
}

#[test]
fn other_forms_are_left_to_libtorch() {
    let options = (Kind::Float, Device::Cpu);
    let image = |channels| Tensor::zeros([2, 3, 3, channels], options).permute([0, 3, 1, 2]);
    let takes = |place, x: &Tensor| takes_form(place, &x.size(), x.kind()) && is_laid_out(x);
    for channels in [8, 12, 24, 64, 4096] {
        assert!(takes(Place::Cpu, &image(channels)));
        assert_eq!(takes(Place::Gpu, &image(channels)), [8, 64].contains(&channels));
    }
    for other in [
        image(64).to_kind(Kind::Half),
        image(64).contiguous(),
        Tensor::zeros([4, 64], options),
        Tensor::zeros([0, 64, 3, 3], options),
    ] {
        assert!(
            !takes(Place::Cpu, &other) && !takes(Place::Gpu, &other),
            "{other:?}"
        );
    }
}

fn add_another_form(kernels: Option<&Kernels>) {
    let case = Case::new([2, 8, 3, 3], Kind::Float, 5);
    let norm = norm(&case.weight, &case.bias, None);
    let other = case.shortcut.narrow(0, 0, 1);
    let _ = batch_norm(kernels, &case.x, &norm, Then::Add(&other));
}

#[test]
#[should_panic(expected = "batch norm: kernel norm_apply_f32: argument 6")]
fn a_shortcut_of_another_form_is_refused() {
    add_another_form(Some(&twins(8)));
}

#[test]
#[should_panic(expected = "batch norm: beside activations of Float [2, 8, 3, 3] are Float [1, 8, 3, 3]")]
fn a_shortcut_of_another_form_is_refused_on_the_cpu_too() {
    add_another_form(None);
}
