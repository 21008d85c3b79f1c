"""A LightningModule as people write them, for checkpoints that Lightning itself saves."""

from factories import tiny_unet
from lightning.pytorch import LightningModule
from switchable import generator
from torch import nn, optim


class Lit(LightningModule):
    """A network and what trains it."""

    def __init__(self, width=4, lr=0.1):
        super().__init__()
        self.save_hyperparameters()
        self.net = tiny_unet(width=width)
        self.loss = nn.Linear(2, 2)

    def forward(self, image):
        return self.net(image)

    def training_step(self, batch, index):
        return self.net(batch).square().mean()

    def configure_optimizers(self):
        return optim.SGD(self.parameters(), lr=self.hparams.lr)


class Switchable(LightningModule):
    """A network whose norm is one of the hyperparameters."""

    def __init__(self, channels=4, norm="instance", lr=0.1):
        super().__init__()
        self.save_hyperparameters()
        self.net = generator(channels, norm)
        self.loss = nn.Linear(2, 2)

    def forward(self, image):
        return self.net(image)
