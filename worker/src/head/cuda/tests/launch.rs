//! Arguments: their layout, how they are spelled, and what becomes of wrong ones.

use crate::nvrtc::Source;
use crate::{
    head::{
        cuda::{
            kernels::{RowsGradient, SgdStep, Weights},
            raw::{self, Others},
        },
        tiled::kernel::rows::{AdamWStep, RowMap},
    },
    kernels::{
        ALL, Kernels,
        launch::{Arguments, Element, LaunchError, Launcher, Shape},
        twin::launcher::{TwinLauncher, count, layouts, parameters},
    },
};
use arcface_proto::types::ClassRange;
use std::{mem::offset_of, sync::Arc};
use tch::{Device, Kind, Tensor};

/// What a kernel takes by value, and what it finds in memory, is laid out as its sources have it.
#[test]
fn structs_are_those_of_the_sources() {
    use raw::History;
    let number = |bytes: i64| bytes as usize * size_of::<u64>();
    let ours = [
        size_of::<History>(),
        offset_of!(History, since),
        offset_of!(History, products),
        offset_of!(History, remembered),
        offset_of!(History, now),
        size_of::<Others>(),
        offset_of!(Others, scale_log2),
        offset_of!(Others, scale_rest),
        offset_of!(Others, zero_above),
        offset_of!(Others, t),
        offset_of!(Others, hard_above),
        offset_of!(Others, shift),
        size_of::<AdamWStep>(),
        offset_of!(AdamWStep, keep),
        offset_of!(AdamWStep, one_less_beta1),
        offset_of!(AdamWStep, beta2),
        offset_of!(AdamWStep, one_less_beta2),
        offset_of!(AdamWStep, rate),
        offset_of!(AdamWStep, correction),
        offset_of!(AdamWStep, eps),
        size_of::<RowMap>(),
        offset_of!(RowMap, w_by_w_less_1),
        offset_of!(RowMap, w_by_v),
        offset_of!(RowMap, v_by_w),
        offset_of!(RowMap, v_by_v),
        // Numbers of a tensor.
        number(raw::SELECTION),
        number(0),
        number(1),
        number(2),
        number(raw::SELECTION - 1),
        size_of::<half::bf16>(),
    ];
    let theirs: Vec<usize> = layouts(ours.len()).into_iter().map(|n| n as usize).collect();
    assert_eq!(theirs, ours);
    // Rows of a tensor.
    assert_eq!(
        raw::ROW_MAPS.numbers() as usize * size_of::<f32>(),
        size_of::<RowMap>()
    );
}

#[test]
fn every_kernel_has_a_twin_and_a_file() {
    let mut all = 0;
    for (source, kernels) in ALL.into_iter().flat_map(Source::of) {
        for kernel in kernels {
            assert!(source.text.contains(kernel), "{kernel} is not in {}", source.name);
            assert!(parameters(kernel).is_some_and(|all| all.len() > 3), "{kernel}");
        }
        all += kernels.len();
    }
    assert_eq!(all, count());
}

#[test]
fn parameters_are_spelled_from_declarations() {
    assert_eq!(
        parameters("head_sgd_rows_bf16").as_deref(),
        Some("<h<f<ull>f>fH>ufff")
    );
    assert_eq!(parameters("head_choose_digit").as_deref(), Some(">ulUi>s"));
    assert_eq!(parameters("head_adamw_idle_rows").as_deref(), Some("<bll>f>f>fA"));
    assert_eq!(
        parameters("head_softmax_terms_bf16").as_deref(),
        Some(">hllll<l<dO>d")
    );
    assert_eq!(parameters("head_nothing"), None);
}

/// One argument too few, two that changed places, a kernel that does not exist.
#[test]
#[allow(unsafe_code)]
fn a_twin_takes_no_other_arguments_than_its_parameters() {
    let launcher = TwinLauncher::new(2);
    let mut flags = [0u8; 3];
    let chosen = [1u32, 2];
    let mut launch = |kernel, order: &[usize]| {
        let mut arguments = Arguments::new();
        for which in order {
            match which {
                0 => arguments.pointer(Element::U32, false, chosen.as_ptr().cast_mut().cast()),
                1 => arguments.value(2i64),
                _ => arguments.pointer(Element::U8, true, flags.as_mut_ptr().cast()),
            }
        }
        // SAFETY: the memory is as large as the kernel takes it for; other arguments are refused.
        unsafe { launcher.launch(kernel, Shape::threads(2), &mut arguments) }
    };
    for (kernel, order) in [
        ("head_mark_chosen", &[0usize, 1][..]),
        ("head_mark_chosen", &[1, 0, 2]),
        ("head_mark_chosen", &[0, 1, 0]),
        ("head_mark_chosen", &[0, 1, 2, 1]),
        ("head_marks", &[0, 1, 2]),
    ] {
        let refused = launch(kernel, order).expect_err("not its parameters").to_string();
        assert!(refused.contains(kernel) && !refused.contains('\n'), "{refused}");
    }
    launch("head_mark_chosen", &[0, 1, 2]).expect("its parameters");
    assert_eq!(flags, [0, 1, 1]);
}

#[test]
fn memory_of_another_form_is_refused() {
    let kernels = Kernels::new(Arc::new(TwinLauncher::new(2)), Device::Cpu);
    let shard = ClassRange { lo: 0, hi: 9 };
    let labels = Tensor::from_slice(&[3i64, 12]);
    let words = |kind, count: i64| Tensor::zeros([count], (kind, Device::Cpu));
    let wrong = |local: &Tensor| {
        let error = kernels.local_classes(&labels, shard, local).expect_err("wrong");
        assert!(matches!(error, LaunchError::Argument { index: 4, .. }), "{error}");
        error.to_string()
    };
    assert!(wrong(&words(Kind::Int, 2)).contains("Int, not Int64"));
    assert!(wrong(&words(Kind::Int64, 1)).contains("1 numbers, not 2"));
    let gaps = Tensor::zeros([2, 3], (Kind::Int64, Device::Cpu)).select(1, 0);
    assert!(wrong(&gaps).contains("gaps"));
    let local = words(Kind::Int64, 2);
    kernels.local_classes(&labels, shard, &local).expect("right");
    assert_eq!(local, Tensor::from_slice(&[3i64, -1]));
    let elsewhere = Kernels::new(Arc::new(TwinLauncher::new(2)), Device::Cuda(0));
    let error = elsewhere
        .local_classes(&labels, shard, &local)
        .expect_err("the CPU's");
    assert!(matches!(error, LaunchError::Argument { index: 0, .. }), "{error}");

    // Rows that may have missed steps are made up for with their momentum.
    let rows = || Tensor::zeros([2, 4], (Kind::Float, Device::Cpu));
    let weights = Weights {
        weight: rows(),
        momentum: None,
        missed: Some(crate::head::cuda::kernels::Missed {
            since: words(Kind::Int, 2),
            products: Tensor::zeros([0, 4], (Kind::Float, Device::Cpu)),
            now: 0,
        }),
    };
    let gradient = RowsGradient {
        gradient: &rows(),
        inverse: &words(Kind::Float, 2),
        chosen: None,
    };
    let step = SgdStep {
        lr: 0.1,
        mu: 0.9,
        decay: 0.0,
    };
    let error = kernels
        .sgd_rows(&weights, &gradient, step)
        .expect_err("no momentum");
    assert!(error.to_string().contains("momentum"), "{error}");
}

#[test]
fn shapes_cover_what_there_is() {
    let grid = |shape: Shape| shape.grid;
    assert_eq!((grid(Shape::blocks(0)), grid(Shape::blocks(7))), (1, 7));
    assert_eq!(grid(Shape::blocks(i64::MAX)), i32::MAX as u32);
    assert_eq!([0, 1, 256, 257].map(|n| grid(Shape::threads(n))), [1, 1, 1, 2]);
}
