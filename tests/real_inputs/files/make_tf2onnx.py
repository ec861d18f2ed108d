"""How the tf2onnx files beside this were made: ``pip install tensorflow-cpu tf2onnx``, then run this.

They are in the repository because TensorFlow is too large to be installed for two tests. Made with TensorFlow 2.21
and tf2onnx 1.17.
"""

from __future__ import annotations

from pathlib import Path

import tensorflow as tf
import tf2onnx

HERE = Path(__file__).parent


class ConvNet(tf.Module):
    """Channels last: two padded Conv with BatchNorm folded by nobody, depthwise Conv, pooling, a dense layer."""

    def __init__(self) -> None:
        super().__init__()
        draw = tf.random.Generator.from_seed(0).normal
        self.first = tf.Variable(draw((3, 3, 3, 8)) * 0.3)
        self.depthwise = tf.Variable(draw((3, 3, 8, 1)) * 0.3)
        self.second = tf.Variable(draw((1, 1, 8, 16)) * 0.3)
        self.statistics = [tf.Variable(1 + 0.1 * draw((8,))) for _ in range(4)]
        self.dense = tf.Variable(draw((16, 5)) * 0.3)

    @tf.function(input_signature=[tf.TensorSpec([None, None, None, 3], tf.float32, name="image")])
    def __call__(self, image: tf.Tensor) -> tf.Tensor:
        scale, offset, mean, variance = self.statistics
        x = tf.nn.conv2d(image, self.first, strides=2, padding="SAME")
        x, _, _ = tf.compat.v1.nn.fused_batch_norm(x, scale, offset, mean, variance, is_training=False)
        x = tf.nn.relu6(x)
        x = tf.nn.depthwise_conv2d(x, self.depthwise, strides=[1, 1, 1, 1], padding="SAME")
        x = tf.nn.swish(tf.nn.conv2d(x, self.second, strides=1, padding="VALID"))
        x = tf.reshape(tf.reduce_mean(x, axis=[1, 2]), [tf.shape(image)[0], 16])
        return tf.nn.softmax(tf.matmul(x, self.dense))


class Loop(tf.Module):
    """A while loop over time steps with a TensorArray, and a cond."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = tf.Variable(tf.random.Generator.from_seed(1).normal((6, 6)) * 0.4)

    @tf.function(input_signature=[tf.TensorSpec([None, None, 6], tf.float32, name="steps")])
    def __call__(self, steps: tf.Tensor) -> tf.Tensor:
        by_time = tf.transpose(steps, [1, 0, 2])
        seen = tf.TensorArray(tf.float32, size=tf.shape(by_time)[0])
        state = tf.zeros_like(by_time[0])
        for i in tf.range(tf.shape(by_time)[0]):
            state = tf.tanh(tf.matmul(state, self.weight) + by_time[i])
            seen = seen.write(i, state)
        result = seen.stack()
        return tf.cond(tf.reduce_sum(result) > 0.0, lambda: result, lambda: -result)


def main() -> None:
    """Convert both."""
    for name, module in (("convnet", ConvNet()), ("loop", Loop())):
        function = module.__call__
        model, _ = tf2onnx.convert.from_function(
            function, input_signature=function.input_signature, opset=15, output_path=str(HERE / f"tf2onnx_{name}.onnx")
        )
        print(name, len(model.graph.node))


if __name__ == "__main__":
    main()
