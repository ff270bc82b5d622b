//! Expressions of one shape as a list of instructions on numbered registers.

use std::collections::HashMap;

use lorasmith_abi::host::{Binary, Code, Dims, Scalar, Unary};

use super::super::blocks::BurnBlocks;
use super::{Expression, LazyTensor, LazyTensors};

/// What is to be computed.
#[derive(Clone)]
pub enum Root {
    /// The elements of a tensor.
    Values(LazyTensor),
    /// The codes of a tensor.
    Codes(LazyTensor, Code),
}

impl Root {
    pub fn tensor(&self) -> &LazyTensor {
        match self {
            Self::Values(tensor) | Self::Codes(tensor, _) => tensor,
        }
    }
}

/// What was computed.
pub enum Made {
    Values(LazyTensor),
    Codes(BurnBlocks),
}

impl Made {
    pub fn values(self) -> Option<LazyTensor> {
        match self {
            Self::Values(tensor) => Some(tensor),
            Self::Codes(_) => None,
        }
    }

    pub fn codes(self) -> Option<BurnBlocks> {
        match self {
            Self::Codes(blocks) => Some(blocks),
            Self::Values(_) => None,
        }
    }
}

/// Where an instruction finds an argument. Numbers are kept as bits: programs are compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Source {
    Register(usize),
    Input(usize),
    Number(u32),
}

/// What an instruction does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    Unary(Unary, Source),
    Scalar(Scalar, Source, u32),
    Binary(Binary, Source, Source),
    Clamp(Source, u32, u32),
    Select(Source, Source, Source),
}

impl Operation {
    fn arguments(self) -> [Option<Source>; 3] {
        match self {
            Self::Unary(_, a) | Self::Scalar(_, a, _) | Self::Clamp(a, ..) => [Some(a), None, None],
            Self::Binary(_, a, b) => [Some(a), Some(b), None],
            Self::Select(a, b, c) => [Some(a), Some(b), Some(c)],
        }
    }
}

/// An operation and the register that its result goes to, which none of its arguments is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Instruction {
    pub operation: Operation,
    pub to: usize,
}

/// How an input relates to the shape that is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InputKind {
    /// An element for each.
    Each,
    /// One element for all.
    One,
    /// Axes of length 1 are spread.
    Spread,
    /// Codes, one for each element.
    Codes(Code),
}

/// What a result is kept as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OutputKind {
    Values,
    Codes(Code),
}

/// Programs that are equal do the same with other inputs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Program {
    pub instructions: Vec<Instruction>,
    pub registers: usize,
    pub inputs: Vec<InputKind>,
    /// When an output is there: after so many instructions, in the order of the instructions; and which it is.
    pub outputs: Vec<Output>,
}

/// One result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Output {
    /// The instructions before it.
    pub after: usize,
    pub source: Source,
    pub kind: OutputKind,
    /// Its place among the roots.
    pub root: usize,
}

/// An input that is there: a tensor has its value, or is part of a long one.
#[derive(Clone)]
pub enum Input {
    Tensor(LazyTensor),
    Codes(BurnBlocks),
}

/// A program, what it works on, and the shape of its results.
pub struct Job {
    pub program: Program,
    pub inputs: Vec<Input>,
    /// Addresses of the expressions that are one element for all: programs that share them share the value.
    pub shared: Vec<usize>,
    pub dims: Dims,
}

impl Job {
    pub fn elements(&self) -> usize {
        self.dims.iter().product()
    }
}

/// Makes programs of expressions; what they need of other shapes is computed on the way.
struct Compiler<'a> {
    tensors: &'a LazyTensors,
    dims: Dims,
    known: HashMap<usize, Source>,
    operations: Vec<Operation>,
    kinds: Vec<InputKind>,
    inputs: Vec<Input>,
    shared: Vec<usize>,
}

/// The program of roots that all have the same shape.
pub fn compile(tensors: &LazyTensors, roots: &[Root]) -> Result<Job, String> {
    let dims = roots.first().ok_or("nothing to compute")?.tensor().dims();
    let mut compiler = Compiler {
        tensors,
        dims,
        known: HashMap::new(),
        operations: Vec::new(),
        kinds: Vec::new(),
        inputs: Vec::new(),
        shared: Vec::new(),
    };
    let mut outputs = Vec::with_capacity(roots.len());
    for (root, wanted) in roots.iter().enumerate() {
        outputs.push(Output {
            source: compiler.visit(wanted.tensor())?,
            after: compiler.operations.len(),
            kind: match wanted {
                Root::Values(_) => OutputKind::Values,
                Root::Codes(_, code) => OutputKind::Codes(*code),
            },
            root,
        });
    }
    let Compiler {
        operations,
        kinds,
        inputs,
        shared,
        ..
    } = compiler;
    Ok(Job {
        program: assign_registers(&operations, kinds, outputs),
        inputs,
        shared,
        dims,
    })
}

impl Compiler<'_> {
    /// The place of a tensor's elements; registers are numbered by instruction for now.
    fn visit(&mut self, tensor: &LazyTensor) -> Result<Source, String> {
        let address = tensor.address();
        if let Some(source) = self.known.get(&address) {
            return Ok(*source);
        }
        let source = self.place(tensor)?;
        self.known.insert(address, source);
        Ok(source)
    }

    fn place(&mut self, tensor: &LazyTensor) -> Result<Source, String> {
        let node = &tensor.0;
        if let Expression::Full(number) = node.expression {
            return Ok(Source::Number(number.to_bits()));
        }
        if node.dims != self.dims || node.value.get().is_some() {
            return self.input_of(tensor);
        }
        let operation = match &node.expression {
            Expression::Leaf | Expression::Part(_) | Expression::Reduced(..) => {
                return self.input_of(tensor);
            }
            Expression::Full(number) => return Ok(Source::Number(number.to_bits())),
            Expression::Decoded(blocks, code) => {
                return Ok(self.input(InputKind::Codes(*code), Input::Codes(blocks.clone())));
            }
            Expression::Unary(op, a) => Operation::Unary(*op, self.visit(a)?),
            Expression::Scalar(op, a, s) => Operation::Scalar(*op, self.visit(a)?, s.to_bits()),
            Expression::Binary(op, a, b) => Operation::Binary(*op, self.visit(a)?, self.visit(b)?),
            Expression::Clamp(a, low, high) => {
                Operation::Clamp(self.visit(a)?, low.to_bits(), high.to_bits())
            }
            Expression::Select(condition, a, b) => {
                Operation::Select(self.visit(condition)?, self.visit(a)?, self.visit(b)?)
            }
        };
        self.operations.push(operation);
        Ok(Source::Register(self.operations.len() - 1))
    }

    fn input_of(&mut self, tensor: &LazyTensor) -> Result<Source, String> {
        let kind = if tensor.dims() == self.dims {
            InputKind::Each
        } else if tensor.elements() == 1 {
            self.shared.push(tensor.address());
            InputKind::One
        } else {
            InputKind::Spread
        };
        if !tensor.is_leaf() {
            self.tensors.value(tensor)?; // is kept in it
        }
        Ok(self.input(kind, Input::Tensor(tensor.clone())))
    }

    fn input(&mut self, kind: InputKind, input: Input) -> Source {
        self.kinds.push(kind);
        self.inputs.push(input);
        Source::Input(self.inputs.len() - 1)
    }
}

/// Gives results registers that are free again when nothing needs what is in them.
fn assign_registers(
    operations: &[Operation],
    inputs: Vec<InputKind>,
    outputs: Vec<Output>,
) -> Program {
    let mut last_use: Vec<usize> = (0..operations.len()).collect();
    for (at, operation) in operations.iter().enumerate() {
        for source in operation.arguments().into_iter().flatten() {
            if let Source::Register(made) = source {
                last_use[made] = at;
            }
        }
    }
    for output in &outputs {
        // Taken before instruction `after` runs.
        if let Source::Register(made) = output.source {
            last_use[made] = last_use[made].max(output.after.saturating_sub(1));
        }
    }
    let mut dying = vec![Vec::new(); operations.len()];
    for (made, &at) in last_use.iter().enumerate() {
        dying[at].push(made);
    }
    let mut places = vec![0; operations.len()];
    let mut free = Vec::new();
    let mut registers = 0;
    let mut instructions = Vec::with_capacity(operations.len());
    for (at, operation) in operations.iter().enumerate() {
        let placed = |source: Source| match source {
            Source::Register(made) => Source::Register(places[made]),
            source => source,
        };
        let operation = match *operation {
            Operation::Unary(op, a) => Operation::Unary(op, placed(a)),
            Operation::Scalar(op, a, s) => Operation::Scalar(op, placed(a), s),
            Operation::Binary(op, a, b) => Operation::Binary(op, placed(a), placed(b)),
            Operation::Clamp(a, low, high) => Operation::Clamp(placed(a), low, high),
            Operation::Select(c, a, b) => Operation::Select(placed(c), placed(a), placed(b)),
        };
        let to = free.pop().unwrap_or_else(|| {
            registers += 1;
            registers - 1
        });
        places[at] = to;
        instructions.push(Instruction { operation, to });
        free.extend(dying[at].iter().map(|&made| places[made]));
    }
    let outputs = outputs.into_iter().map(|output| Output {
        source: match output.source {
            Source::Register(made) => Source::Register(places[made]),
            source => source,
        },
        ..output
    });
    Program {
        instructions,
        registers,
        inputs,
        outputs: outputs.collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_are_used_again() {
        // A chain needs two registers, whatever its length: none is written and read by one instruction.
        let operations: Vec<Operation> = (0..20)
            .map(|at: usize| {
                let source = at.checked_sub(1).map_or(Source::Input(0), Source::Register);
                Operation::Scalar(Scalar::Add, source, 1.0_f32.to_bits())
            })
            .collect();
        let output = Output {
            after: 20,
            source: Source::Register(19),
            kind: OutputKind::Values,
            root: 0,
        };
        let program = assign_registers(&operations, vec![InputKind::Each], vec![output]);
        assert_eq!(program.registers, 2);
        for instruction in &program.instructions {
            let arguments = instruction.operation.arguments();
            let to = Source::Register(instruction.to);
            assert!(!arguments.contains(&Some(to)), "{instruction:?}");
        }
    }

    #[test]
    fn a_result_that_is_an_output_and_used_later_stays() {
        let number = 1.0_f32.to_bits();
        let add = |source| Operation::Scalar(Scalar::Add, source, number);
        let operations = [
            add(Source::Input(0)),
            add(Source::Input(0)),
            Operation::Binary(Binary::Add, Source::Register(0), Source::Register(1)),
        ];
        let output = |root, after, made| Output {
            after,
            source: Source::Register(made),
            kind: OutputKind::Values,
            root,
        };
        let outputs = vec![output(0, 1, 0), output(1, 3, 2)];
        let program = assign_registers(&operations, vec![InputKind::Each], outputs);
        let to: Vec<usize> = program.instructions.iter().map(|i| i.to).collect();
        assert_eq!(program.registers, 3);
        assert_eq!(to, [0, 1, 2]);
    }
}
