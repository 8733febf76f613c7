"""Small PyTorch models whose arrays have the names that torchvision's models give them."""

from collections import OrderedDict


def small_models(torch):
    """A constructor for each family of `surgery.torchvision_rules` but ResNet."""
    nn = torch.nn

    def named(**layers):
        return nn.Sequential(OrderedDict(layers))

    def conv_norm(act, *sizes, stride=1, groups=1, eps=1e-5):
        pad = (sizes[2] - 1) // 2
        conv = nn.Conv2d(*sizes, stride, pad, groups=groups, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(sizes[1], eps), act())

    def classified(features, *classifier):
        return named(
            features=features,
            pool=nn.AdaptiveAvgPool2d(1),
            flat=nn.Flatten(),
            classifier=nn.Sequential(*classifier),
        )

    class Residual(nn.Module):
        def __init__(self, name, *layers, skip=True):
            super().__init__()
            setattr(self, name, nn.Sequential(*layers))
            self.name, self.skip = name, skip

        def forward(self, x):
            y = getattr(self, self.name)(x)
            return x + y if self.skip else y

    class SqueezeExcitation(nn.Module):
        def __init__(self, features, squeezed, act, gate):
            super().__init__()
            self.fc1 = nn.Conv2d(features, squeezed, 1)
            self.fc2 = nn.Conv2d(squeezed, features, 1)
            self.act, self.gate = act(), gate()

        def forward(self, x):
            s = self.act(self.fc1(x.mean((2, 3), keepdim=True)))
            return x * self.gate(self.fc2(s))

    class Concatenated(nn.Sequential):
        def forward(self, x):
            for layer in self:
                x = torch.cat([x, layer(x)], 1)
            return x

    class LayerNorm2d(nn.LayerNorm):
        def forward(self, x):
            return super().forward(x.movedim(1, -1)).movedim(-1, 1)

    class Move(nn.Module):
        def __init__(self, *axes):
            super().__init__()
            self.axes = axes

        def forward(self, x):
            return x.movedim(*self.axes)

    class Scaled(Residual):
        def __init__(self, features, *layers):
            super().__init__("block", *layers)
            self.layer_scale = nn.Parameter(torch.rand(features, 1, 1))

        def forward(self, x):
            return x + self.layer_scale * self.block(x)

    def vgg(norms):
        features = []
        for sizes in ((3, 4), (4, 6)):
            norm = [nn.BatchNorm2d(sizes[1])] if norms else []
            features += [nn.Conv2d(*sizes, 3, 1, 1), *norm, nn.ReLU(), nn.MaxPool2d(2)]
        hidden = [nn.Linear(24, 5), nn.ReLU(), nn.Dropout(), nn.Linear(5, 5), nn.ReLU()]
        return named(
            features=nn.Sequential(*features),
            flat=nn.Flatten(),
            classifier=nn.Sequential(*hidden, nn.Dropout(), nn.Linear(5, 3)),
        )

    def densenet():
        def layer(features):
            return named(
                norm1=nn.BatchNorm2d(features),
                relu1=nn.ReLU(),
                conv1=nn.Conv2d(features, 4, 1, bias=False),
                norm2=nn.BatchNorm2d(4),
                relu2=nn.ReLU(),
                conv2=nn.Conv2d(4, 2, 3, 1, 1, bias=False),
            )

        def block(*features):
            layers = {f"denselayer{j}": layer(n) for j, n in enumerate(features, 1)}
            return Concatenated(OrderedDict(layers))

        features = named(
            conv0=nn.Conv2d(3, 4, 7, 2, 3, bias=False),
            norm0=nn.BatchNorm2d(4),
            relu0=nn.ReLU(),
            pool0=nn.MaxPool2d(3, 2, 1),
            denseblock1=block(4, 6),
            transition1=named(
                norm=nn.BatchNorm2d(8),
                relu=nn.ReLU(),
                conv=nn.Conv2d(8, 4, 1, bias=False),
                pool=nn.AvgPool2d(2),
            ),
            denseblock2=block(4),
            norm5=nn.BatchNorm2d(6),
            relu=nn.ReLU(),
        )
        pool, flat = nn.AdaptiveAvgPool2d(1), nn.Flatten()
        return named(features=features, pool=pool, flat=flat, classifier=nn.Linear(6, 3))

    def mobilenet_v2():
        features = nn.Sequential(
            conv_norm(nn.ReLU6, 3, 4, 3, stride=2),
            Residual(
                "conv",
                conv_norm(nn.ReLU6, 4, 4, 3, groups=4),
                nn.Conv2d(4, 4, 1, bias=False),
                nn.BatchNorm2d(4),
            ),
            Residual(
                "conv",
                conv_norm(nn.ReLU6, 4, 8, 1),
                conv_norm(nn.ReLU6, 8, 8, 3, stride=2, groups=8),
                nn.Conv2d(8, 6, 1, bias=False),
                nn.BatchNorm2d(6),
                skip=False,
            ),
            conv_norm(nn.ReLU6, 6, 8, 1),
        )
        return classified(features, nn.Dropout(), nn.Linear(8, 3))

    def mobilenet_v3():
        eps = {"eps": 1e-3}
        features = nn.Sequential(
            conv_norm(nn.Hardswish, 3, 4, 3, stride=2, **eps),
            Residual(
                "block",
                conv_norm(nn.ReLU, 4, 4, 3, groups=4, **eps),
                conv_norm(nn.Identity, 4, 4, 1, **eps),
            ),
            Residual(
                "block",
                conv_norm(nn.Hardswish, 4, 6, 1, **eps),
                conv_norm(nn.Hardswish, 6, 6, 5, stride=2, groups=6, **eps),
                SqueezeExcitation(6, 2, nn.ReLU, nn.Hardsigmoid),
                conv_norm(nn.Identity, 6, 5, 1, **eps),
                skip=False,
            ),
            conv_norm(nn.Hardswish, 5, 8, 1, **eps),
        )
        classifier = [nn.Linear(8, 6), nn.Hardswish(), nn.Dropout(), nn.Linear(6, 3)]
        return classified(features, *classifier)

    def efficientnet():
        features = nn.Sequential(
            conv_norm(nn.SiLU, 3, 4, 3, stride=2),
            nn.Sequential(
                Residual(
                    "block",
                    conv_norm(nn.SiLU, 4, 4, 3, groups=4),
                    SqueezeExcitation(4, 1, nn.SiLU, nn.Sigmoid),
                    conv_norm(nn.Identity, 4, 4, 1),
                )
            ),
            nn.Sequential(
                Residual(
                    "block",
                    conv_norm(nn.SiLU, 4, 8, 1),
                    conv_norm(nn.SiLU, 8, 8, 5, stride=2, groups=8),
                    SqueezeExcitation(8, 1, nn.SiLU, nn.Sigmoid),
                    conv_norm(nn.Identity, 8, 6, 1),
                    skip=False,
                )
            ),
            conv_norm(nn.SiLU, 6, 8, 1),
        )
        return classified(features, nn.Dropout(), nn.Linear(8, 3))

    def convnext():
        def block(n):
            return Scaled(
                n,
                nn.Conv2d(n, n, 7, 1, 3, groups=n),
                Move(1, -1),
                nn.LayerNorm(n, 1e-6),
                nn.Linear(n, 4 * n),
                nn.GELU(),
                nn.Linear(4 * n, n),
                Move(-1, 1),
            )

        features = nn.Sequential(
            nn.Sequential(nn.Conv2d(3, 4, 4, 4), LayerNorm2d(4, 1e-6)),
            nn.Sequential(block(4)),
            nn.Sequential(LayerNorm2d(4, 1e-6), nn.Conv2d(4, 6, 2, 2)),
            nn.Sequential(block(6)),
        )
        classifier = nn.Sequential(LayerNorm2d(6, 1e-6), nn.Flatten(), nn.Linear(6, 3))
        return named(features=features, pool=nn.AdaptiveAvgPool2d(1), classifier=classifier)

    class EncoderLayer(nn.Module):
        def __init__(self):
            super().__init__()
            self.ln_1, self.ln_2 = nn.LayerNorm(6, 1e-6), nn.LayerNorm(6, 1e-6)
            self.self_attention = nn.MultiheadAttention(6, 2, batch_first=True)
            layers = [nn.Linear(6, 8), nn.GELU(), nn.Dropout(), nn.Linear(8, 6), nn.Dropout()]
            self.mlp = nn.Sequential(*layers)

        def forward(self, x):
            y = self.ln_1(x)
            x = x + self.self_attention(y, y, y, need_weights=False)[0]
            return x + self.mlp(self.ln_2(x))

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.pos_embedding = nn.Parameter(torch.randn(1, 5, 6))
            self.layers = named(encoder_layer_0=EncoderLayer())
            self.ln = nn.LayerNorm(6, 1e-6)

        def forward(self, x):
            return self.ln(self.layers(x + self.pos_embedding))

    class VisionTransformer(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv_proj = nn.Conv2d(3, 6, 4, 4)
            self.class_token = nn.Parameter(torch.randn(1, 1, 6))
            self.encoder = Encoder()
            self.heads = named(head=nn.Linear(6, 3))

        def forward(self, x):
            x = self.conv_proj(x).flatten(2).movedim(1, -1)
            x = torch.cat([self.class_token.expand(len(x), -1, -1), x], 1)
            return self.heads(self.encoder(x)[:, 0])

    return {
        "vgg": lambda: vgg(norms=False),
        "vgg_bn": lambda: vgg(norms=True),
        "densenet": densenet,
        "mobilenet_v2": mobilenet_v2,
        "mobilenet_v3": mobilenet_v3,
        "efficientnet": efficientnet,
        "convnext": convnext,
        "vit": VisionTransformer,
    }
