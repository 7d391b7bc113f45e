"""Models of the experiments, without weights."""

from keras_fisher.applications.dense_net import DenseNet
from keras_fisher.applications.resnet import ResNet
from keras_fisher.applications.simple_cnn import SimpleCNN
from keras_fisher.applications.vgg import VGG11
from keras_fisher.applications.wide_resnet import WideResNet

__all__ = ["VGG11", "DenseNet", "ResNet", "SimpleCNN", "WideResNet"]
