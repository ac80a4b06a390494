//! Translates steps into ONNX operators. Pure: no file is written here, and weights are computed only when somebody
//! asks for them.

use tch::{Kind, Tensor};

use super::{
    fold::{Affine, Step},
    proto::{
        AttributeProto, AttributeType, DataType, DimensionProto, GraphProto, NodeProto, TensorShapeProto,
        TensorTypeProto, TypeProto, ValueInfoProto,
    },
};
use crate::model::graph::{Graph, IMAGES, Op};

/// Name of the input.
pub const INPUT: &str = "input";
/// Name of the output.
pub const OUTPUT: &str = "embedding";
/// Name of the first dimension of both.
const BATCH: &str = "batch";

/// A constant of the graph. Large networks do not fit into memory twice, so values are made one at a time.
pub struct Initializer {
    /// Name of the value.
    pub name: String,
    /// Shape.
    pub dims: Vec<i64>,
    /// Kind of the elements.
    pub data_type: DataType,
    value: Box<dyn Fn() -> Tensor>,
}

impl Initializer {
    /// Computes the values: a tensor of the shape and kind above.
    pub fn value(&self) -> Tensor {
        tch::no_grad(|| (self.value)())
    }

    /// Length of the values in bytes.
    pub fn num_bytes(&self) -> u64 {
        let size = match self.data_type {
            DataType::Int64 => 8,
            DataType::Float | DataType::Undefined => 4,
        };
        self.dims.iter().product::<i64>() as u64 * size
    }
}

/// A graph whose weights are not in it yet.
pub struct Emitted {
    /// Everything but the initializers.
    pub graph: GraphProto,
    /// What belongs into it.
    pub initializers: Vec<Initializer>,
}

/// Translates `steps` of `graph`.
pub fn emit(name: &str, graph: &Graph, steps: &[Step]) -> Emitted {
    let mut emitter = Emitter {
        graph,
        names: vec![String::new(); graph.shapes.len()],
        nodes: Vec::with_capacity(steps.len()),
        initializers: Vec::new(),
    };
    emitter.names[IMAGES] = INPUT.to_owned();
    for step in steps {
        emitter.step(step);
    }
    Emitted {
        graph: GraphProto {
            name: name.to_owned(),
            node: emitter.nodes,
            initializer: Vec::new(),
            input: vec![value_info(INPUT, &graph.shapes[IMAGES])],
            output: vec![value_info(OUTPUT, &graph.shapes[graph.output])],
        },
        initializers: emitter.initializers,
    }
}

/// An input or output of the graph: any number of what `shape` has one of.
fn value_info(name: &str, shape: &[i64]) -> ValueInfoProto {
    let batch = DimensionProto {
        dim_value: None,
        dim_param: Some(BATCH.to_owned()),
    };
    let known = |&n: &i64| DimensionProto {
        dim_value: Some(n),
        dim_param: None,
    };
    let dim = std::iter::once(batch)
        .chain(shape.iter().skip(1).map(known))
        .collect();
    ValueInfoProto {
        name: name.to_owned(),
        r#type: Some(TypeProto {
            tensor_type: Some(TensorTypeProto {
                elem_type: Some(DataType::Float.into()),
                shape: Some(TensorShapeProto { dim }),
            }),
        }),
    }
}

fn int(name: &str, value: i64) -> AttributeProto {
    AttributeProto {
        name: name.to_owned(),
        i: Some(value),
        r#type: Some(AttributeType::Int.into()),
        ..Default::default()
    }
}

fn float(name: &str, value: f64) -> AttributeProto {
    AttributeProto {
        name: name.to_owned(),
        f: Some(value as f32),
        r#type: Some(AttributeType::Float.into()),
        ..Default::default()
    }
}

fn ints(name: &str, values: &[i64]) -> AttributeProto {
    AttributeProto {
        name: name.to_owned(),
        ints: values.to_vec(),
        r#type: Some(AttributeType::Ints.into()),
        ..Default::default()
    }
}

struct Emitter<'a> {
    graph: &'a Graph,
    /// Names of the values that were made so far.
    names: Vec<String>,
    nodes: Vec<NodeProto>,
    initializers: Vec<Initializer>,
}

impl Emitter<'_> {
    fn step(&mut self, step: &Step) {
        let then = step.then.as_ref();
        let inputs: Vec<String> = step
            .node
            .inputs
            .iter()
            .map(|&value| self.names[value].clone())
            .collect();
        let inputs = inputs.iter().map(String::as_str);
        let layer = self.layer(step);
        let output = if step.output == self.graph.output {
            OUTPUT.to_owned()
        } else {
            layer.clone()
        };
        match &step.node.op {
            Op::Conv { weight, bias, shape } => {
                let weight = self.rows(&layer, weight, then);
                let bias = self.bias(&layer, bias.as_ref(), then);
                let attributes = vec![
                    ints("kernel_shape", &[shape.kernel; 2]),
                    ints("strides", &[shape.stride; 2]),
                    ints("pads", &[shape.padding; 4]),
                    ints("dilations", &[1; 2]),
                    int("group", shape.groups),
                ];
                let inputs = inputs.chain([weight.as_str()]).chain(bias.as_deref());
                self.node(&layer, "Conv", inputs, &output, attributes);
            }
            Op::Linear { weight, bias } => {
                let weight = self.rows(&layer, weight, then);
                let bias = self.bias(&layer, bias.as_ref(), then);
                let inputs = inputs.chain([weight.as_str()]).chain(bias.as_deref());
                self.node(&layer, "Gemm", inputs, &output, vec![int("transB", 1)]);
            }
            Op::BatchNorm {
                weight,
                bias,
                mean,
                variance,
                eps,
            } => {
                let constants =
                    [weight, bias, mean, variance].map(|tensor| self.parameter(tensor, &tensor.size()));
                let inputs = inputs.chain(constants.iter().map(String::as_str));
                self.node(
                    &layer,
                    "BatchNormalization",
                    inputs,
                    &output,
                    vec![float("epsilon", *eps)],
                );
            }
            Op::PRelu { weight } => {
                // The slope is aligned with the last dimensions of its input.
                let mut dims = vec![1; self.graph.shapes[step.node.inputs[0]].len() - 1];
                dims[0] = weight.size()[0];
                let slope = self.parameter(weight, &dims);
                self.node(&layer, "PRelu", inputs.chain([slope.as_str()]), &output, vec![]);
            }
            Op::Add => self.node(&layer, "Add", inputs, &output, vec![]),
            Op::Flatten => self.node(&layer, "Flatten", inputs, &output, vec![int("axis", 1)]),
        }
        self.names[step.output] = output;
    }

    /// Name of a step: its module's, or what it does and the value that it makes.
    fn layer(&self, step: &Step) -> String {
        let numbered = |what: &str| format!("{what}_{}", step.output);
        match &step.node.op {
            Op::Conv { weight, .. }
            | Op::Linear { weight, .. }
            | Op::BatchNorm { weight, .. }
            | Op::PRelu { weight } => module(self.graph.name(weight)).to_owned(),
            Op::Add => numbered("add"),
            Op::Flatten => numbered("flatten"),
        }
    }

    fn node<'n>(
        &mut self,
        name: &str,
        op_type: &str,
        inputs: impl Iterator<Item = &'n str>,
        output: &str,
        attribute: Vec<AttributeProto>,
    ) {
        self.nodes.push(NodeProto {
            name: name.to_owned(),
            op_type: op_type.to_owned(),
            input: inputs.map(str::to_owned).collect(),
            output: vec![output.to_owned()],
            attribute,
        });
    }

    /// A tensor of the state as it is, with its elements in another shape; returns its name.
    fn parameter(&mut self, tensor: &Tensor, dims: &[i64]) -> String {
        let name = self.graph.name(tensor).to_owned();
        let shape = dims.to_vec();
        let tensor = tensor.shallow_clone();
        self.constant(name, dims, move || tensor.reshape(shape.as_slice()))
    }

    /// The weight of a layer, each row multiplied by what follows the layer; returns its name.
    fn rows(&mut self, layer: &str, weight: &Tensor, then: Option<&Affine>) -> String {
        let dims = weight.size();
        let weight = weight.shallow_clone();
        let scale = then.map(|then| {
            let mut shape = vec![1; dims.len()];
            shape[0] = -1;
            then.scale.view(shape.as_slice())
        });
        self.constant(format!("{layer}.weight"), &dims, move || match &scale {
            None => weight.shallow_clone(),
            Some(scale) => (weight.to_kind(Kind::Double) * scale).to_kind(Kind::Float),
        })
    }

    /// The bias of a layer after what follows the layer, if either is there; returns its name.
    fn bias(&mut self, layer: &str, bias: Option<&Tensor>, then: Option<&Affine>) -> Option<String> {
        let bias = match (bias, then) {
            (None, None) => return None,
            (Some(bias), None) => bias.shallow_clone(),
            (None, Some(then)) => then.shift.to_kind(Kind::Float),
            (Some(bias), Some(then)) => {
                (bias.detach().to_kind(Kind::Double) * &then.scale + &then.shift).to_kind(Kind::Float)
            }
        };
        let dims = bias.size();
        Some(self.constant(format!("{layer}.bias"), &dims, move || bias.shallow_clone()))
    }

    fn constant(&mut self, name: String, dims: &[i64], value: impl Fn() -> Tensor + 'static) -> String {
        self.initializers.push(Initializer {
            name: name.clone(),
            dims: dims.to_vec(),
            data_type: DataType::Float,
            value: Box::new(value),
        });
        name
    }
}

/// The module that a parameter belongs to.
fn module(parameter: &str) -> &str {
    parameter.rsplit_once('.').map_or(parameter, |(module, _)| module)
}
