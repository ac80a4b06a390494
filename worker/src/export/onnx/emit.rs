//! Translates steps into ONNX operators. Pure: no file is written here.
//!
//! A value is called as the module that makes it (`layer1.0.conv1`), or as what made it and its number (`add_12`); a
//! node is called as its value, and a weight as in the network's state.

use std::collections::HashSet;

use tch::Tensor;

use super::{
    constants::Initializer,
    proto::{AttributeProto, GraphProto, NodeProto, ValueInfoProto},
};
use crate::model::{
    fold::{self, Step},
    graph::{Graph, IMAGES, Op},
};

/// Name of the input.
const INPUT: &str = "input";
/// Name of the output.
const OUTPUT: &str = "embedding";
/// Name of the first dimension of both.
const BATCH: &str = "batch";

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
        shared: HashSet::new(),
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
            input: vec![ValueInfoProto::batch(INPUT, BATCH, &graph.shapes[IMAGES])],
            output: vec![ValueInfoProto::batch(OUTPUT, BATCH, &graph.shapes[graph.output])],
        },
        initializers: emitter.initializers,
    }
}

/// The graph so far.
pub(super) struct Emitter<'a> {
    graph: &'a Graph,
    /// Names of the values that were made.
    names: Vec<String>,
    nodes: Vec<NodeProto>,
    initializers: Vec<Initializer>,
    /// Names of the constants that several nodes read.
    shared: HashSet<String>,
}

impl Emitter<'_> {
    fn step(&mut self, step: &Step) {
        let layer = self.layer(step);
        let output = match step.output == self.graph.output {
            true => OUTPUT.to_owned(),
            false => layer.clone(),
        };
        let inputs: Vec<String> = step
            .node
            .inputs
            .iter()
            .map(|&value| self.names[value].clone())
            .collect();
        let shape = &self.graph.shapes[step.node.inputs[0]];
        let x = inputs[0].as_str();
        match &step.node.op {
            Op::Conv { weight, bias, shape } => {
                let attributes = vec![
                    AttributeProto::ints("kernel_shape", &[shape.kernel; 2]),
                    AttributeProto::ints("strides", &[shape.stride; 2]),
                    AttributeProto::ints("pads", &[shape.padding; 4]),
                    AttributeProto::ints("dilations", &[1; 2]),
                    AttributeProto::int("group", shape.groups),
                ];
                let inputs = self.weights(x, &layer, weight, bias.as_ref(), step);
                self.node("Conv", &inputs, &output, attributes);
            }
            Op::Linear { weight, bias } if shape.len() == 2 => {
                let inputs = self.weights(x, &layer, weight, bias.as_ref(), step);
                self.node("Gemm", &inputs, &output, vec![AttributeProto::int("transB", 1)]);
            }
            Op::Linear { weight, bias } => self.linear_of_tokens(&layer, x, weight, bias.as_ref(), &output),
            Op::BatchNorm {
                weight,
                bias,
                mean,
                variance,
                eps,
            } => {
                let [weight, bias, mean, variance] =
                    [weight, bias, mean, variance].map(|tensor| self.parameter(tensor, &tensor.size()));
                let inputs = [x, &weight, &bias, &mean, &variance];
                let attributes = vec![AttributeProto::float("epsilon", *eps)];
                self.node("BatchNormalization", &inputs, &output, attributes);
            }
            Op::PRelu { weight } => {
                // The slope is aligned with the last dimensions of its input.
                let mut dims = vec![1; shape.len() - 1];
                dims[0] = weight.size()[0];
                let slope = self.parameter(weight, &dims);
                self.node("PRelu", &[x, &slope], &output, vec![]);
            }
            Op::Add => self.node("Add", &[x, &inputs[1]], &output, vec![]),
            Op::Flatten => self.node("Flatten", &[x], &output, vec![AttributeProto::int("axis", 1)]),
            Op::LayerNorm { weight, bias, eps } => {
                let [weight, bias] = [weight, bias].map(|tensor| self.parameter(tensor, &tensor.size()));
                let attributes = vec![
                    AttributeProto::int("axis", -1),
                    AttributeProto::float("epsilon", *eps),
                ];
                self.node("LayerNormalization", &[x, &weight, &bias], &output, attributes);
            }
            Op::AddParameter { parameter } => {
                let parameter = self.parameter(parameter, &parameter.size());
                self.node("Add", &[x, &parameter], &output, vec![]);
            }
            Op::Relu6 => {
                let lower = self.number(0.0);
                let upper = self.number(6.0);
                self.node("Clip", &[x, &lower, &upper], &output, vec![]);
            }
            Op::Tokens => self.tokens(x, shape, &output),
            Op::Attention { heads } => self.attention(x, shape, *heads, &output),
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
            | Op::LayerNorm { weight, .. }
            | Op::PRelu { weight } => module(self.graph.name(weight)).to_owned(),
            Op::Add | Op::AddParameter { .. } => numbered("add"),
            Op::Flatten => numbered("flatten"),
            Op::Relu6 => numbered("relu6"),
            Op::Tokens => numbered("tokens"),
            Op::Attention { .. } => numbered("attention"),
        }
    }

    /// The weight and bias of a layer with what follows it in both; returns what the operator reads.
    fn weights(
        &mut self,
        x: &str,
        layer: &str,
        weight: &Tensor,
        bias: Option<&Tensor>,
        step: &Step,
    ) -> Vec<String> {
        let then = step.then.as_ref();
        let weight_name = format!("{layer}.weight");
        let mut inputs = vec![x.to_owned()];
        inputs.push(self.constant(weight_name, &weight.size(), fold::rows(weight, then)));
        if let Some(bias) = fold::bias(bias, then) {
            inputs.push(self.constant(format!("{layer}.bias"), &bias.size(), move || {
                bias.shallow_clone()
            }));
        }
        inputs
    }

    /// One operator that makes one value.
    pub(super) fn node(
        &mut self,
        op_type: &str,
        inputs: &[impl AsRef<str>],
        output: &str,
        attribute: Vec<AttributeProto>,
    ) {
        self.node_of_many(op_type, inputs, &[output], attribute);
    }

    /// One operator.
    pub(super) fn node_of_many(
        &mut self,
        op_type: &str,
        inputs: &[impl AsRef<str>],
        outputs: &[&str],
        attribute: Vec<AttributeProto>,
    ) {
        self.nodes.push(NodeProto {
            name: outputs[0].to_owned(),
            op_type: op_type.to_owned(),
            input: inputs.iter().map(|name| name.as_ref().to_owned()).collect(),
            output: outputs.iter().map(|&name| name.to_owned()).collect(),
            attribute,
        });
    }

    /// A tensor of the state, with its elements in another shape; returns its name.
    fn parameter(&mut self, tensor: &Tensor, dims: &[i64]) -> String {
        let name = self.graph.name(tensor).to_owned();
        let tensor = tensor.shallow_clone();
        self.constant(name, dims, move || tensor.shallow_clone())
    }

    /// A weight of a layer; returns its name.
    pub(super) fn constant(
        &mut self,
        name: String,
        dims: &[i64],
        value: impl Fn() -> Tensor + 'static,
    ) -> String {
        self.initializers
            .push(Initializer::new(name.clone(), dims, value));
        name
    }

    /// A number that any node may read; returns its name.
    pub(super) fn number(&mut self, value: f32) -> String {
        self.shared(format!("number_{value}"), |name| {
            Initializer::new(name, &[], move || Tensor::from(value))
        })
    }

    /// A shape that any node may read; returns its name.
    pub(super) fn shape(&mut self, values: &[i64]) -> String {
        let lengths: Vec<String> = values.iter().map(i64::to_string).collect();
        self.shared(format!("shape_{}", lengths.join("_")), |name| {
            Initializer::ints(name, values.to_vec())
        })
    }

    fn shared(&mut self, name: String, make: impl FnOnce(String) -> Initializer) -> String {
        if self.shared.insert(name.clone()) {
            self.initializers.push(make(name.clone()));
        }
        name
    }
}

/// The module that a parameter belongs to.
fn module(parameter: &str) -> &str {
    parameter.rsplit_once('.').map_or(parameter, |(module, _)| module)
}
