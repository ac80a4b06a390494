//! Exported files, read back: their structure, and their values through a small interpreter of the operators, which
//! needs nothing outside this build. onnxruntime itself reads them in `worker/tests/onnx_runtime.rs`.

use std::{
    collections::{BTreeSet, HashMap},
    path::Path,
};

use arcface_proto::spec::Precision;
use prost::Message;
use tch::{Kind, Tensor};

use super::{
    Options,
    proto::{AttributeProto, DataLocation, DataType, ModelProto, NodeProto, TensorProto, ValueInfoProto},
    write,
};
use crate::{
    export::from_bytes,
    model::{Backbone, BackboneConfig, ForwardMode, fill},
};

const SEPARATE: Options = Options {
    fold_batch_norm: false,
    limit: super::file::PROTOBUF_LIMIT,
};

fn filled(network: &str) -> Backbone {
    let mut backbone = Backbone::new(&BackboneConfig::new(network, 16)).unwrap();
    backbone.fill_golden();
    backbone
}

fn read(path: &Path) -> ModelProto {
    ModelProto::decode(std::fs::read(path).unwrap().as_slice()).unwrap()
}

/// The values of an initializer, in the file or beside it.
fn values(tensor: &TensorProto, folder: &Path) -> Tensor {
    let bytes = match tensor.data_location() {
        DataLocation::Default => tensor.raw_data.clone().unwrap(),
        DataLocation::External => {
            let facts: HashMap<&str, &str> = tensor
                .external_data
                .iter()
                .map(|entry| (entry.key.as_str(), entry.value.as_str()))
                .collect();
            let number = |key: &str| facts[key].parse::<usize>().unwrap();
            assert_eq!(number("offset") % 4096, 0);
            let all = std::fs::read(folder.join(facts["location"])).unwrap();
            all[number("offset")..][..number("length")].to_vec()
        }
    };
    let kind = match tensor.data_type() {
        DataType::Float => Kind::Float,
        DataType::Int64 => Kind::Int64,
        DataType::Undefined => panic!("{} has no kind", tensor.name),
    };
    from_bytes(&bytes, &tensor.dims, kind).unwrap()
}

fn attribute<'a>(node: &'a NodeProto, name: &str) -> Option<&'a AttributeProto> {
    node.attribute.iter().find(|attribute| attribute.name == name)
}

fn int(node: &NodeProto, name: &str) -> i64 {
    attribute(node, name).and_then(|a| a.i).unwrap()
}

fn float(node: &NodeProto, name: &str) -> f64 {
    f64::from(attribute(node, name).and_then(|a| a.f).unwrap())
}

fn ints(node: &NodeProto, name: &str) -> Vec<i64> {
    attribute(node, name).unwrap().ints.clone()
}

/// One operator as the ONNX specification defines it.
fn operator(node: &NodeProto, x: &[&Tensor]) -> Tensor {
    match node.op_type.as_str() {
        "Conv" => {
            assert_eq!(ints(node, "kernel_shape"), x[1].size()[2..]);
            let pads = ints(node, "pads");
            let (strides, dilations) = (ints(node, "strides"), ints(node, "dilations"));
            x[0].conv2d(
                x[1],
                x.get(2).copied(),
                strides,
                &pads[..2],
                dilations,
                int(node, "group"),
            )
        }
        "Gemm" => {
            assert_eq!(int(node, "transB"), 1);
            let y = x[0].matmul(&x[1].tr());
            x.get(2).map_or(y.shallow_clone(), |bias| y + *bias)
        }
        "BatchNormalization" => {
            let mut channels = vec![1; x[0].dim()];
            channels[1] = -1;
            let [scale, bias, mean, variance] = [x[1], x[2], x[3], x[4]].map(|t| t.view(channels.as_slice()));
            (x[0] - mean) / (variance + float(node, "epsilon")).sqrt() * scale + bias
        }
        "LayerNormalization" => {
            assert_eq!(int(node, "axis"), -1);
            let mean = x[0].mean_dim(-1, true, Kind::Float);
            let centred = x[0] - mean;
            let variance = centred.square().mean_dim(-1, true, Kind::Float);
            centred / (variance + float(node, "epsilon")).sqrt() * x[1] + x[2]
        }
        "PRelu" => x[0].clamp_min(0.0) + x[0].clamp_max(0.0) * x[1],
        "Clip" => x[0].maximum(x[1]).minimum(x[2]),
        "Add" => x[0] + x[1],
        "Mul" => x[0] * x[1],
        "MatMul" => x[0].matmul(x[1]),
        "Softmax" => x[0].softmax(int(node, "axis"), Kind::Float),
        "Flatten" => x[0].flatten(int(node, "axis"), -1),
        "Transpose" => x[0].permute(ints(node, "perm")),
        "Reshape" => {
            let mut shape = Vec::<i64>::try_from(x[1]).unwrap();
            // 0 is the input's own length.
            shape
                .iter_mut()
                .zip(x[0].size())
                .filter(|(to, _)| **to == 0)
                .for_each(|(to, from)| *to = from);
            x[0].reshape(shape)
        }
        other => panic!("{}: operator {other}", node.name),
    }
}

/// All that an operator makes.
fn outputs(node: &NodeProto, x: &[&Tensor]) -> Vec<Tensor> {
    match node.op_type.as_str() {
        "Split" => x[0].chunk(node.output.len() as i64, int(node, "axis")),
        _ => vec![operator(node, x)],
    }
}

/// What the file computes.
fn run(path: &Path, images: &Tensor) -> Tensor {
    let graph = read(path).graph.unwrap();
    let mut known: HashMap<&str, Tensor> = graph
        .initializer
        .iter()
        .map(|tensor| (tensor.name.as_str(), values(tensor, path.parent().unwrap())))
        .collect();
    known.insert("input", images.shallow_clone());
    for node in &graph.node {
        let inputs: Vec<&Tensor> = node.input.iter().map(|name| &known[name.as_str()]).collect();
        let made = outputs(node, &inputs);
        known.extend(node.output.iter().map(String::as_str).zip(made));
    }
    known.remove("embedding").unwrap()
}

fn assert_computes(path: &Path, backbone: &Backbone) {
    let images = fill::symmetric("input", &[2, 3, 112, 112]);
    let mode = ForwardMode::evaluation(Precision::Fp32);
    let expected = tch::no_grad(|| backbone.forward(&images, &mode));
    let difference = (run(path, &images) - &expected).abs().max().double_value(&[]);
    // Rounding of f32 sums in another order; the embeddings are of size 1.
    assert!(difference < 1e-4, "{}: {difference:.1e}", path.display());
}

#[test]
fn the_file_computes_what_the_network_computes() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.onnx");
    for network in ["tiny", "mbf", "vit_t"] {
        let backbone = filled(network);
        for options in [Options::default(), SEPARATE] {
            let written = write(&path, &backbone, options).unwrap();
            assert_eq!(written.bytes, std::fs::metadata(&path).unwrap().len());
            assert_eq!(written.data, None);
            assert_computes(&path, &backbone);
        }
    }
}

#[test]
fn weights_over_the_limit_go_beside_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.onnx");
    let backbone = filled("tiny");
    let options = Options {
        limit: 100_000,
        ..Options::default()
    };
    let written = write(&path, &backbone, options).unwrap();
    let (data, length) = written.data.unwrap();
    assert_eq!(data, folder.path().join("model.onnx.data"));
    assert_eq!(length, std::fs::metadata(&data).unwrap().len());
    assert!(written.bytes <= 100_000 && written.bytes == std::fs::metadata(&path).unwrap().len());
    assert_computes(&path, &backbone);

    let nothing = Options {
        limit: 100,
        ..options
    };
    let error = write(&path, &backbone, nothing).unwrap_err();
    assert!(
        error.to_string().contains("without its weights is over"),
        "{error}"
    );
}

#[test]
fn every_value_is_made_once_and_before_it_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.onnx");
    for network in ["tiny", "mbf", "vit_t"] {
        write(&path, &filled(network), Options::default()).unwrap();
        let graph = read(&path).graph.unwrap();
        let mut known: BTreeSet<&str> = BTreeSet::from(["input"]);
        let mut unread: BTreeSet<&str> = BTreeSet::new();
        for tensor in &graph.initializer {
            assert!(
                known.insert(&tensor.name),
                "{network}: {} is there twice",
                tensor.name
            );
            unread.insert(&tensor.name);
        }
        let mut nodes = BTreeSet::new();
        for node in &graph.node {
            assert!(
                nodes.insert(&node.name),
                "{network}: two nodes are called {}",
                node.name
            );
            for input in &node.input {
                assert!(
                    known.contains(input.as_str()),
                    "{network}: {}: {input} is not made yet",
                    node.name
                );
                unread.remove(input.as_str());
            }
            for output in &node.output {
                assert!(known.insert(output), "{network}: {output} is made twice");
                unread.insert(output);
            }
        }
        assert_eq!(
            unread,
            BTreeSet::from(["embedding"]),
            "{network}: nobody reads these"
        );
    }
}

fn dims(value: &ValueInfoProto) -> Vec<String> {
    let shape = value
        .r#type
        .as_ref()
        .and_then(|t| t.tensor_type.as_ref())
        .and_then(|t| t.shape.as_ref());
    let dim = |dim: &super::proto::DimensionProto| {
        dim.dim_param
            .clone()
            .unwrap_or_else(|| dim.dim_value.unwrap().to_string())
    };
    shape.unwrap().dim.iter().map(dim).collect()
}

#[test]
fn the_file_says_what_it_is_and_what_it_takes() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.onnx");
    write(&path, &filled("tiny"), Options::default()).unwrap();
    let model = read(&path);
    assert_eq!(model.producer_name, "arcface-worker");
    assert_eq!(model.producer_version, env!("CARGO_PKG_VERSION"));
    assert_eq!(model.opset_import[0].version, Some(17));
    let facts: HashMap<&str, &str> = model
        .metadata_props
        .iter()
        .map(|entry| (entry.key.as_str(), entry.value.as_str()))
        .collect();
    assert_eq!((facts["network"], facts["embedding_size"]), ("tiny", "16"));
    assert_eq!(
        (facts["color"], facts["input_mean"], facts["input_std"]),
        ("RGB", "127.5", "127.5")
    );
    let graph = model.graph.unwrap();
    assert_eq!((graph.input.len(), graph.output.len()), (1, 1));
    assert_eq!(dims(&graph.input[0]), ["batch", "3", "112", "112"]);
    assert_eq!(dims(&graph.output[0]), ["batch", "16"]);
}
