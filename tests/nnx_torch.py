"""The networks of tests/nnx_models.py in PyTorch, ConvNeXt and ViT with layer norm."""


def twins(torch):
    nn, functional = torch.nn, torch.nn.functional

    class Block(nn.Module):
        def __init__(self, before, features, stride):
            super().__init__()
            self.conv1 = nn.Conv2d(before, features, 3, stride, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(features)
            self.conv2 = nn.Conv2d(features, features, 3, 1, 1, bias=False)
            self.bn2 = nn.BatchNorm2d(features)
            self.downsample = nn.Sequential()
            if stride > 1:
                self.downsample.append(nn.Conv2d(before, features, 1, stride, bias=False))
                self.downsample.append(nn.BatchNorm2d(features))

        def forward(self, x):
            y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
            return torch.relu(self.downsample(x) + y)

    class ResNet(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1 = nn.Conv2d(3, 4, 3, 1, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(4)
            self.layer1 = nn.Sequential(Block(4, 4, 1))
            self.layer2 = nn.Sequential(Block(4, 6, 2))
            self.fc = nn.Linear(6, 5)

        def forward(self, x):
            x = torch.relu(self.bn1(self.conv1(x)))
            return self.fc(self.layer2(self.layer1(x)).mean((2, 3)))

    def layer_norm(features):
        return nn.LayerNorm(features, eps=1e-6)

    class ConvNeXtBlock(nn.Module):
        def __init__(self, n):
            super().__init__()
            self.dwconv = nn.Conv2d(n, n, 7, padding=3, groups=n)
            self.norm = layer_norm(n)
            self.pwconv1, self.pwconv2 = nn.Linear(n, 4 * n), nn.Linear(4 * n, n)
            self.gamma = nn.Parameter(torch.full((n,), 0.5))

        def forward(self, x):
            y = self.norm(self.dwconv(x).movedim(1, -1))
            y = self.pwconv2(functional.gelu(self.pwconv1(y))) * self.gamma
            return x + y.movedim(-1, 1)

    class ConvNeXt(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.stem_norm = nn.Conv2d(3, 4, 4, 4), layer_norm(4)
            self.blocks = nn.Sequential(ConvNeXtBlock(4), ConvNeXtBlock(4))
            self.head_norm, self.head = layer_norm(4), nn.Linear(4, 5)

        def forward(self, x):
            x = self.stem_norm(self.stem(x).movedim(1, -1)).movedim(-1, 1)
            return self.head(self.head_norm(self.blocks(x).mean((2, 3))))

    class EncoderLayer(nn.Module):
        def __init__(self, features, heads):
            super().__init__()
            self.ln1, self.ln2 = layer_norm(features), layer_norm(features)
            self.attention = nn.MultiheadAttention(features, heads, batch_first=True)
            self.mlp1 = nn.Linear(features, 2 * features)
            self.mlp2 = nn.Linear(2 * features, features)

        def forward(self, x):
            y = self.ln1(x)
            x = x + self.attention(y, y, y)[0]
            return x + self.mlp2(functional.gelu(self.mlp1(self.ln2(x))))

    class ViT(nn.Module):
        def __init__(self, features=6):
            super().__init__()
            self.patches, self.stem_norm = nn.Conv2d(3, features, 4, 4), layer_norm(features)
            self.position = nn.Parameter(torch.randn(1, 16, features))
            self.layers = nn.Sequential(EncoderLayer(features, 2), EncoderLayer(features, 2))
            self.ln, self.head = layer_norm(features), nn.Linear(features, 5)

        def forward(self, x):
            x = self.stem_norm(self.patches(x).movedim(1, -1)).flatten(1, 2) + self.position
            return self.head(self.ln(self.layers(x)).mean(1))

    return {"ResNet": ResNet, "ConvNeXt": ConvNeXt, "ViT": ViT}
