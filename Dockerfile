# The serving image: a bundle, the embedded server, no torch.
#   docker build -t utune-deploy .
#   docker run -p 8000:8000 -p 8001:8001 -v ./bundle:/bundle:ro utune-deploy
FROM python:3.11-slim-bookworm

WORKDIR /opt/utune
COPY . src
RUN pip install --no-cache-dir -c src/requirements/constraints.txt -r src/requirements/serving.txt \
 && pip install --no-cache-dir --no-deps ./src \
 && rm -rf src \
 && useradd --create-home utune
USER utune
EXPOSE 8000 8001
HEALTHCHECK --interval=10s --timeout=3s --start-period=20s \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/v2/health/ready', timeout=2)"]
ENTRYPOINT ["utune-deploy", "serve"]
CMD ["/bundle", "--host", "0.0.0.0"]
